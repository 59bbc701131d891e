"""Online merging around any torch optimizer: the method needs only its updates."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Adafactor, Muon, Optimizer

from operators.optim.base import AnyTau, Nonfinite, OnlineMergingBase, Stepped
from operators.optim.layout import local
from operators.optim.options import AlphaSchedule, MergeOptions, Rounding
from operators.optim.tau import DeltaPlacement, MissingDelta
from operators.optim.update import Update

# Optimizers whose update of an element depends on other elements; by name, because several
# libraries implement them.
_NOT_ELEMENTWISE = {"Adafactor", "Muon", "Shampoo", "SOAP"}


class OnlineMerging(OnlineMergingBase):
    """Merges the updates of any optimizer with a reference delta; options as `OnlineMergingAdamW`.

    Args:
        base_optimizer: made with `model.named_parameters()`. Its groups may set their own options
            with a prefix (`merging_density`), because some optimizers have an `alpha` too. Step
            this optimizer instead of the base optimizer. The base's decoupled weight decay (AdamW,
            NAdam and RAdam with that flag, Adafactor, Muon) is applied outside the merge.

    Groups, state, learning rates and schedulers are shared with the base optimizer. `delta` is the
    difference of the parameters before and after its step; so it includes the rounding of that
    step, and each step needs a temporary copy of the parameters. With density 1 and alpha 0 it has
    the same bits as the base optimizer.

    Raises:
        ValueError: as `OnlineMergingAdamW`; also half-precision parameters, which lose the base's
            own updates; LBFGS; a base that is not element-wise on sharded parameters.
    """

    _prefix = "merging_"

    def __init__(
        self,
        base_optimizer: Optimizer,
        reference_delta: AnyTau,
        *,
        consensus: str = "dare",
        density: float = 1.0,
        alpha: float = 1e-7,
        merge_every: int = 1,
        rescale: bool = False,
        rounding: Rounding = "nearest",
        alpha_schedule: AlphaSchedule = "constant",
        seed: int = 0,
        missing_delta: MissingDelta = "error",
        delta_placement: DeltaPlacement = "device",
        delta_dtype: torch.dtype = torch.bfloat16,
        nonfinite: Nonfinite = "raise",
        sparsifier: str | None = None,
        sparsifier_parameters: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(base_optimizer, LBFGS):
            raise ValueError(
                "base_optimizer: found LBFGS, which takes several steps in one; "
                "allowed: optimizers that make one update a step"
            )
        options = MergeOptions(
            consensus=consensus,
            sparsifier=sparsifier,
            sparsifier_parameters=dict(sparsifier_parameters or {}),
            density=density,
            alpha=alpha,
            merge_every=merge_every,
            rescale=rescale,
            rounding=rounding,
            alpha_schedule=alpha_schedule,
            seed=seed,
        )
        self.base_optimizer = base_optimizer
        self._prepare(reference_delta, missing_delta, delta_placement, delta_dtype, nonfinite)
        super().__init__(
            base_optimizer.param_groups,
            {**base_optimizer.defaults, **options.in_group(self._prefix)},
        )
        self._share(base_optimizer.state, base_optimizer.param_groups)

    def _share(self, state: Any, groups: list[dict[str, Any]]) -> None:
        """Share state and groups with the base optimizer."""
        self.state = self.base_optimizer.state = state
        self.param_groups = self.base_optimizer.param_groups = groups

    def _passes_through(self, group: dict[str, Any]) -> bool:
        """Whether merging changes nothing, so that only the base steps these parameters."""
        return self._options(group).changes_nothing

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the base optimizer gets the group too."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            self._check_base(parameter, group)

    def _check_base(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Raise ValueError if the base optimizer's updates of a parameter cannot be merged."""
        if not parameter.requires_grad:
            return
        layouts, _ = self._bindings.of(parameter, self._options(group))
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {layouts[0].name!r}: found {parameter.dtype}, in which the base "
                "optimizer's updates vanish; allowed: float32 and float64, or OnlineMergingAdamW"
            )
        names = {base.__name__ for base in type(self.base_optimizer).__mro__}
        if names & _NOT_ELEMENTWISE and any(layout.group is not None for layout in layouts):
            raise ValueError(
                f"base_optimizer: found {type(self.base_optimizer).__name__} on the sharded "
                f"parameter {layouts[0].name!r}; its updates are not element-wise, so they would "
                "depend on the sharding; allowed: whole parameters"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One merged step of the base optimizer; parameters without a gradient stay unchanged.

        Raises:
            ValueError: a sparse gradient, or one with Inf or NaN (see `nonfinite`).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._gradients()
        if self._is_skipped(parameters):
            return loss
        rehearsal = self._is_rehearsal(parameters)
        self._unscale(parameters)
        merging = [(p, group) for p, group in parameters if not self._passes_through(group)]
        anchors = [self._before(parameter, group) for parameter, group in merging]
        with self._without_decay():
            self.base_optimizer.step()
        due = []
        for (parameter, group), anchor in zip(merging, anchors, strict=True):
            if rehearsal:
                self._new_state(parameter, group, anchor)
            elif self._count_step(parameter, group, anchor):
                due.append(self._difference(parameter, group, anchor))
        if due:
            self._merger.forget_counts()
        self._merge_from_anchors(due)
        return loss

    def _unscale(self, parameters: Stepped) -> None:
        """Divide gradients by a GradScaler's scale if the scaler leaves that to the optimizer."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            for parameter, _ in parameters:
                local(parameter.grad).div_(scale.to(parameter.device))  # type: ignore[arg-type]

    def _before(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Apply the base's decoupled decay; return the anchor of this step, flat."""
        theta, state = local(parameter), self.state.get(parameter, {})
        anchor = local(state["anchor"]) if "anchor" in state else theta.clone()
        if self._is_decoupled(group):
            decay = 1 - float(group["lr"]) * group["weight_decay"]
            theta.mul_(decay)
            anchor.mul_(decay)
        return anchor

    def _count_step(self, parameter: Tensor, group: dict[str, Any], anchor: Tensor) -> bool:
        """Count a parameter's step; return whether it is merged now."""
        state = self.state[parameter]
        if "merging_step" not in state:
            self._new_state(parameter, group, anchor)
        state["merging_step"] += 1
        return self._steps_of(state) % int(self._options(group).merge_every) == 0

    def _new_state(self, parameter: Tensor, group: dict[str, Any], anchor: Tensor) -> None:
        """Add to a parameter's state, which the base has already created."""
        state = self.state[parameter]
        state["merging_step"] = torch.tensor(0.0)
        if self._options(group).merge_every > 1:
            state["anchor"] = torch.empty_like(parameter)
            local(state["anchor"]).copy_(anchor)

    def _difference(self, parameter: Tensor, group: dict[str, Any], anchor: Tensor) -> Update:
        """The update to merge: since the anchor of step-K, or since the start of this step."""
        if "anchor" in self.state[parameter]:
            return self._since_anchor(parameter, self._options(group))
        theta = local(parameter)
        options = self._options(group)
        return self._update(parameter, options, lambda at: theta[at] - anchor[at], anchor)

    def _steps_of(self, state: dict[str, Any]) -> int:
        return int(state["merging_step"])

    def _is_decoupled(self, group: dict[str, Any]) -> bool:
        """Whether the base multiplies parameters by `1 - lr * weight_decay`."""
        known = isinstance(self.base_optimizer, Adafactor | Muon)
        return bool(group.get("weight_decay")) and (
            known or bool(group.get("decoupled_weight_decay"))
        )

    @contextmanager
    def _without_decay(self) -> Iterator[None]:
        """Switch off the base optimizer's decay, which is already applied."""
        taken = [
            (group, group["weight_decay"])
            for group in self.param_groups
            if self._is_decoupled(group) and not self._passes_through(group)
        ]
        for group, _ in taken:
            group["weight_decay"] = 0.0
        try:
            yield
        finally:
            for group, weight_decay in taken:
                group["weight_decay"] = weight_decay

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the base optimizer's state is in the same dictionary."""
        super().load_state_dict(state_dict)
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._share(self.base_optimizer.state, self.base_optimizer.param_groups)
