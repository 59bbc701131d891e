"""What online merging optimizers share: options, tau, guards, the tail of step-K."""

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

    A group's `merge` False lets its updates through. `anchor` in a parameter's state is its value
    after the last merge (step-K).
    """

    _step_supports_amp_scaling = True  # a GradScaler leaves unscaling and skipping to `step`
    _prefix = ""  # of the options' keys in a group

    def _prepare(
        self,
        tau: AnyTau,
        missing_delta: MissingDelta,
        delta_placement: DeltaPlacement,
        delta_dtype: torch.dtype,
        nonfinite: Nonfinite,
    ) -> None:
        """Set what `add_param_group` needs, which torch's constructor calls."""
        check_choice("nonfinite", nonfinite, ("raise", "skip"))
        self._nonfinite = nonfinite
        self._tau = Tau(tau, missing_delta, delta_placement, delta_dtype)
        self._bindings = Bindings(self._tau)
        self._merger = Merger(self._tau)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters, with options of its own where it has some.

        Raises:
            ValueError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("first_lr", float(group["lr"]))
        names = names_of(group)
        self._check_group(group)
        self._bindings.add(names, group["params"], self._options(group))

    def _options(self, group: dict[str, Any]) -> MergeOptions:
        """A group's options of merging, as they are now."""
        return MergeOptions.of(group, self._prefix)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._options(group).check(has_tau=self._tau.source is not None)

    def bind(self, layouts: Mapping[Tensor, Sequence[ShardLayout]]) -> None:
        """Say which parameters lie in tensors that have taken the parameters' place, such as
        ZeRO's flat partitions; from then on those are the ones that `step` accepts.

        Args:
            layouts: for each tensor, its ranges, with their offsets. A parameter of which this
                rank owns nothing has a layout of count 0, wherever other ranks have some of it.

        Raises:
            ValueError: ranges that overlap or leave their tensor.
        """
        self._bindings.replace(layouts)

    def merge_counts(self) -> Tensor:
        """Of the elements that the last (counted) merge was to move on this rank, how many rounding
        left where they were; and all: (2,) int64.
        """
        return self._merger.counts.cpu()

    def unchanged_share(self) -> float:
        """Of what the last merge added on this rank, the share of elements that rounding undid: 0
        to 1, NaN before the first merge. High: use `rounding="stochastic"` or a larger alpha.
        """
        num_unchanged, num_merged = self.merge_counts()
        return float(num_unchanged / num_merged)

    def reference_bytes(self) -> int:
        """Bytes that tau takes on this rank, on the device or the host."""
        return self._tau.num_bytes()

    @torch.no_grad()
    def merge_pending(self) -> None:
        """Merge the tail of step-K that is shorter than K; nothing where no step is pending: where
        on no rank a weight has moved since the last merge.
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
        """Load what `state_dict` gave; the next step is bit for bit the one that would have been.

        torch casts state to its parameter's dtype; moments and anchors keep the dtype they had.
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
        """Steps that a parameter has taken."""
        return int(state["step"])

    def _since_anchor(self, parameter: Tensor, options: MergeOptions) -> Update:
        """All that plain steps have added since the last merge, as one update."""
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
        """An update of a parameter, to be added to its anchor or else to itself."""
        layouts, merged = self._bindings.of(parameter, options)
        step = self._steps_of(self.state[parameter])
        theta = local(parameter)
        base = theta if anchor is None else anchor
        return Update(theta, base, decay, delta, layouts, merged, step, options)

    def _merge_from_anchors(self, updates: list[Update]) -> None:
        """theta = anchor + merge(theta - anchor), which is the next anchor."""
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
        """Whether a first step is one at learning rate 0 on gradients of zero, by which
        torch.distributed.checkpoint makes an optimizer's state: it must not move along tau.
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
            ValueError: there is one, no GradScaler looks after it, and `nonfinite` is "raise".
        """
        parts, owners = [], []  # not the padding of flat tensors, which may be anything
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
