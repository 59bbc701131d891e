"""The common part of online merging optimizers: options, tau, guards, the tail of step-K."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from operators.kernels.optimizer import first_not_finite
from operators.optim.binding import Bindings
from operators.optim.layout import ShardLayout, local, local_gradient
from operators.optim.merger import Merger
from operators.optim.options import MergeOptions, check_choice, names_of
from operators.optim.tau import DeltaPlacement, DeltaSource, MissingDelta, Tau
from operators.optim.update import Update

Nonfinite = Literal["raise", "skip"]
AnyTau = Mapping[str, Tensor] | DeltaSource | None
Stepped = list[tuple[Tensor, dict[str, Any]]]  # parameters with their groups


class OnlineMergingBase(Optimizer):
    """The part of an online merging optimizer that does not depend on its base optimizer.

    A group with `merge` False has its updates applied unmerged. `anchor` in a parameter's state is
    its value after the last merge (step-K).
    """

    _step_supports_amp_scaling = True  # a GradScaler leaves unscaling and skipping to `step`
    _prefix = ""  # of the options' keys in a parameter group

    def _prepare(
        self,
        tau: AnyTau,
        missing_delta: MissingDelta,
        delta_placement: DeltaPlacement,
        delta_dtype: torch.dtype,
        nonfinite: Nonfinite,
    ) -> None:
        """Set the attributes that `add_param_group` needs; torch's constructor calls it."""
        check_choice("nonfinite", nonfinite, ("raise", "skip"))
        self._nonfinite = nonfinite
        self._tau = Tau(tau, missing_delta, delta_placement, delta_dtype)
        self._bindings = Bindings(self._tau)
        self._merger = Merger(self._tau)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters, with its own options if it has some.

        Raises:
            ValueError: as in the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("first_lr", float(group["lr"]))
        names = names_of(group)
        self._check_group(group)
        self._bindings.add(names, group["params"], self._options(group))

    def _options(self, group: dict[str, Any]) -> MergeOptions:
        """A group's current merging options."""
        return MergeOptions.of(group, self._prefix)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._options(group).check(has_tau=self._tau.source is not None)

    def bind(self, layouts: Mapping[Tensor, Sequence[ShardLayout]]) -> None:
        """Replace the parameters by other tensors that hold them, such as ZeRO's flat partitions;
        afterwards `step` accepts only these tensors.

        Args:
            layouts: for each tensor, the ranges of parameters in it. If this rank owns no element
                of a parameter but other ranks do, the parameter needs a layout of count 0.

        Raises:
            ValueError: ranges that overlap or leave their tensor.
        """
        self._bindings.replace(layouts)

    def merge_counts(self) -> Tensor:
        """Counts of the last counted merge on this rank, (2,) int64: elements that should move but
        that rounding left unchanged, and all elements that should move.
        """
        return self._merger.counts.cpu()

    def unchanged_share(self) -> float:
        """Of the elements that the last counted merge should move on this rank, the share that
        rounding left unchanged: 0 to 1, NaN before the first merge. If it is high, use
        `rounding="stochastic"` or a larger alpha.
        """
        num_unchanged, num_merged = self.merge_counts()
        return float(num_unchanged / num_merged)

    def reference_bytes(self) -> int:
        """Bytes of tau on this rank, on the device or the host."""
        return self._tau.num_bytes()

    @torch.no_grad()
    def merge_pending(self) -> None:
        """Merge the last steps of step-K if they are fewer than K. Does nothing if no weight has
        moved since the last merge on any rank.
        """
        updates = []
        for group in self.param_groups:
            options = self._options(group)
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "anchor" in state and self._steps_of(state) % options.merge_every:
                    updates.append(self._since_anchor(parameter, options))
        if updates and self._any_moved(updates):
            self._merger.forget_counts()
            self._merge_from_anchors(updates)

    def _any_moved(self, updates: list[Update]) -> bool:
        """Whether any parameter has left its anchor, on any rank."""
        moved = any(not torch.equal(update.theta, update.base) for update in updates)
        flag = torch.tensor([moved], dtype=torch.int64, device=updates[0].theta.device)
        return bool(self._bindings.flags_anywhere(flag).item())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`; the next step has the same bits as without the reload.

        torch casts state to its parameter's dtype; moments and anchors keep their own dtype here.
        """
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for i, tensor in zip(saved, tensors, strict=True):
            if tensor.dtype in (torch.bfloat16, torch.float16):
                for name, value in state_dict["state"].get(i, {}).items():
                    if isinstance(value, Tensor) and name != "step":
                        self.state[tensor][name] = value.detach().to(tensor.device, copy=True)

    def _steps_of(self, state: dict[str, Any]) -> int:
        """The number of steps of a parameter."""
        return int(state["step"])

    def _since_anchor(self, parameter: Tensor, options: MergeOptions) -> Update:
        """The sum of the plain steps since the last merge, as one update."""
        state = self.state[parameter]
        theta, anchor = local(parameter), local(state["anchor"])

        def delta(place: slice) -> Tensor:
            return theta[place] - anchor[place]

        return self._update(parameter, options, delta, anchor)

    def _update(
        self,
        parameter: Tensor,
        options: MergeOptions,
        delta: Callable[[slice], Tensor],
        anchor: Tensor | None = None,
        decay: float = 1.0,
    ) -> Update:
        """An update of a parameter, relative to its anchor, or to the parameter itself."""
        layouts, merged = self._bindings.of(parameter, options)
        step = self._steps_of(self.state[parameter])
        theta = local(parameter)
        base = theta if anchor is None else anchor
        return Update(theta, base, decay, delta, layouts, merged, step, options)

    def _merge_from_anchors(self, updates: list[Update]) -> None:
        """Set theta and the next anchor to anchor + merge(theta - anchor)."""
        self._merger.merge(updates)
        for update in updates:
            update.base.copy_(update.theta)

    def _gradients(self) -> Stepped:
        """Parameters that have a gradient, with their groups.

        Raises:
            ValueError: a gradient is sparse.
        """
        found = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    self._bindings.of(parameter, self._options(group))
                    name = self._bindings.name(parameter)
                    raise ValueError(
                        f"parameter {name}: its gradient is sparse; allowed: dense ones"
                    )
                found.append((parameter, group))
        return found

    def _is_rehearsal(self, parameters: Stepped) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint creates an optimizer's
        state: the first one, at learning rate 0, with zero gradients. It must not move along tau.
        """
        if self.state or not parameters or any(float(g["lr"]) for _, g in parameters):
            return False
        moves = any(bool(local_gradient(p).any()) for p, _ in parameters)
        flag = torch.tensor([moves], dtype=torch.int64, device=parameters[0][0].device)
        return not self._bindings.flags_anywhere(flag).item()

    def _first_not_finite(self, gradients: list[Tensor]) -> int | None:
        """Position of the first gradient with Inf or NaN."""
        return first_not_finite(gradients)

    def _is_skipped(self, parameters: Stepped) -> bool:
        """Whether a gradient with Inf or NaN, on any rank, forbids this step.

        Raises:
            ValueError: there is one, there is no GradScaler, and `nonfinite` is "raise".
        """
        parts, owners = [], []  # without the padding of flat tensors, which is undefined
        for parameter, group in parameters:
            layouts, _ = self._bindings.of(parameter, self._options(group))
            gradient = local_gradient(parameter)
            parts += [gradient[at.offset : at.offset + at.count] for at in layouts]
            owners += layouts
        device = parameters[0][0].device if parameters else torch.device("cpu")
        found_inf = getattr(self, "found_inf", None)
        worst = None
        if found_inf is None:
            worst = self._first_not_finite(parts)
            flag = torch.tensor([worst is not None], dtype=torch.int64, device=device)
        else:
            flag = (found_inf.reshape(1) > 0).long().to(device)
        if not self._bindings.flags_anywhere(flag).item():
            return False
        if found_inf is None and self._nonfinite == "raise":
            where = "on another rank"
            if worst is not None:
                where = f"of parameter {owners[worst].name!r}"
            raise ValueError(
                f"gradient: found Inf or NaN {where}; nothing was changed; "
                "allowed: finite ones, or nonfinite='skip'"
            )
        return True
