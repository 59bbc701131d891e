"""OnDARE and OnTIES around AdamW (Lu et al. 2024); the equations are in `operators.optim.merge`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from operators.optim.adamw import AdamWStep, moments, new_state
from operators.optim.base import Nonfinite, OnlineMergingBase, Reference
from operators.optim.fast import FastPath, FastUpdate
from operators.optim.layout import ShardLayout, local, local_gradient
from operators.optim.merge import GRADIENT_STREAM, Update
from operators.optim.options import (
    AlphaSchedule,
    Consensus,
    Rounding,
    check_adamw,
    check_choice,
)
from operators.optim.path import IMPLEMENTATIONS, Implementation, choose_path
from operators.optim.reference import DeltaPlacement, MissingDelta
from operators.sparsify import Rescale, bernoulli

NamedParameters = Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class OnlineMergingAdamW(OnlineMergingBase):
    """AdamW whose updates are merged, step by step, with a reference delta.

    Args:
        named_parameters: `model.named_parameters()`, or groups of them (`{"params": [(name,
            tensor), ...], ...}`), as torch's optimizers take them. Plain tensors, or DTensors
            sharded by rows. A group may have its own value of every option up to `seed`, and
            `"merge": False`, which makes it plain AdamW.
        reference_delta: tau by parameter name, or a `DeltaSource`; None where alpha is 0.
        lr, betas, eps, weight_decay: as `torch.optim.AdamW`.
        consensus: `dare` (random masks, sum) or `ties` (largest magnitudes, sign consensus).
        density: p in (0, 1], the fraction kept of update and tau.
        alpha: a in [0, 1), the weight of tau.
        merge_every: K >= 1, merge once in K steps (step-K); call `merge_pending()` at the end.
        rescale: divide what `dare` keeps by the density (the paper does not).
        rounding: how parameters are written. `stochastic` keeps small updates on average;
            bfloat16 and float16 parameters need it.
        alpha_schedule: `constant`, or alpha in proportion to the learning rate (`lr`).
        gradient_density, gradient_rescale: ChildTuning-F: keep this share of the gradient, by
            chance, before the moments see it, and divide it by the share.
        seed: of the masks and of the rounding.
        missing_delta, delta_placement, delta_dtype: see `ReferenceDelta`.
        nonfinite: a gradient with Inf or NaN is an error (`raise`), or its step is left out on
            all ranks (`skip`); either way nothing has changed.
        implementation: the arithmetic's path: `reference`, `compiled` (C) or `triton`;
            `auto` takes what size and machine are worth, says so once, and keeps it on resumption.

    With density 1 and alpha 0 it is torch's AdamW (`foreach=False, fused=False`) bit for bit. Masks
    and thresholds follow the global index, so they are the same under any sharding.

    Raises:
        ValueError: a value out of range or without effect, an unnamed parameter, one of a dtype
            that `rounding` does not go with, one whose tau is missing or of another shape.
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        reference_delta: Reference,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        consensus: Consensus = "dare",
        density: float = 1.0,
        alpha: float = 1e-7,
        merge_every: int = 1,
        rescale: bool = False,
        rounding: Rounding = "nearest",
        alpha_schedule: AlphaSchedule = "constant",
        gradient_density: float = 1.0,
        gradient_rescale: bool = True,
        seed: int = 0,
        missing_delta: MissingDelta = "error",
        delta_placement: DeltaPlacement = "device",
        delta_dtype: torch.dtype = torch.bfloat16,
        nonfinite: Nonfinite = "raise",
        implementation: Implementation = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "consensus": consensus,
            "density": density,
            "alpha": alpha,
            "merge_every": merge_every,
            "rescale": rescale,
            "rounding": rounding,
            "alpha_schedule": alpha_schedule,
            "gradient_density": gradient_density,
            "gradient_rescale": gradient_rescale,
            "seed": seed,
            "merge": True,
            "path": None,
        }
        check_choice("implementation", implementation, IMPLEMENTATIONS)
        self._wanted: Implementation = implementation
        self._path: str | None = None
        self._fast: FastPath | None = None
        self._prepare(reference_delta, missing_delta, delta_placement, delta_dtype, nonfinite)
        super().__init__(named_parameters, defaults)

    @property
    def path(self) -> str | None:
        """The path taken: reference, compiled or triton; None before the first step."""
        return self._path

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_adamw(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; parameters without a gradient are left alone.

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
        if self._is_rehearsal(parameters):
            for parameter, group in parameters:
                self.state[parameter].update(new_state(parameter, anchored=_is_anchored(group)))
            return loss
        fast = self._fast_path(parameters)
        quick = [(p, g) for p, g in parameters if fast is not None and self._goes_fast(p, g)]
        steps = [self._begin(parameter, group) for parameter, group in quick]
        chosen = {id(parameter) for parameter, _ in quick}
        updates = [self._advance(p, group) for p, group in parameters if id(p) not in chosen]
        due = [(p, group) for p, group in parameters if self._is_due(p, group)]
        if due or updates or any(step.counting for step in steps):
            self._merger.forget_counts()
        if fast is not None:
            fast.step(steps)
        self._merger.merge(updates)
        self._merge_from_anchors([self._since_anchor(p, group) for p, group in due])
        return loss

    def _first_not_finite(self, gradients: list[Tensor]) -> int | None:
        """Position of the first gradient with Inf or NaN, by the fused passes if there are."""
        if self._fast is None:
            return super()._first_not_finite(gradients)
        return self._fast.first_not_finite(gradients)

    def _is_due(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether step-K merges after this step."""
        steps = self._steps_of(self.state[parameter])
        return _is_anchored(group) and steps % int(group["merge_every"]) == 0

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> FastUpdate:
        """Count a parameter's step and make its update, of moments that are not yet advanced.

        With step-K it is not to be merged: a plain step moves theta.
        """
        state, anchored = self.state[parameter], _is_anchored(group)
        if not state:
            state.update(new_state(parameter, anchored=anchored))
        state["step"] += 1
        numbers = AdamWStep.of(group, self._steps_of(state))
        mean, square = moments(state)

        def delta(place: slice) -> Tensor:
            return numbers.delta(mean[place], square[place])

        update = self._update(parameter, group, delta)
        if anchored:
            local(state["anchor"]).mul_(numbers.decay)
            update.merged = [False] * len(update.layouts)
        return FastUpdate(update, numbers, local_gradient(parameter), mean, square)

    def _advance(self, parameter: Tensor, group: dict[str, Any]) -> Update:
        """Advance the moments, apply the decay, and return what AdamW would add."""
        begun = self._begin(parameter, group)
        update, numbers = begun.update, begun.numbers
        stochastic = group["rounding"] == "stochastic"
        if stochastic:
            update.decay = numbers.decay
        for layout in update.layouts:
            for start, place in layout.chunks():
                gradient = self._gradient(begun, layout, start, place)
                numbers.advance(begun.mean[place], begun.square[place], gradient)
                if not stochastic:
                    update.theta[place].mul_(numbers.decay)
        return update

    def _gradient(self, begun: FastUpdate, layout: ShardLayout, start: int, place: slice) -> Tensor:
        """A chunk of the gradient, unscaled and after gradient dropout: in the moments' dtype."""
        gradient, group = begun.gradient[place].to(begun.mean.dtype), begun.update.group
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            gradient = gradient / scale.to(gradient.device)
        if group["gradient_density"] < 1:
            rescale: Rescale = "inverse_density" if group["gradient_rescale"] else "none"
            key = begun.update.key(layout, GRADIENT_STREAM)
            gradient = bernoulli(gradient, group["gradient_density"], key, start, rescale)
        return gradient

    def _goes_fast(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether the fused passes can do a parameter's step; the same on every rank."""
        assert parameter.grad is not None
        return (
            parameter.dtype == parameter.grad.dtype == torch.float32
            and group["rounding"] == "nearest"
            and not group["rescale"]
            and group["gradient_density"] == 1
            and (group["consensus"] == "dare" or group["density"] < 1)
            and getattr(self, "grad_scale", None) is None
        )

    def _fast_path(self, parameters: list[tuple[Tensor, dict[str, Any]]]) -> FastPath | None:
        """The fused passes, once they are chosen; None on the reference path."""
        if self._path is None and parameters:
            wanted = self.param_groups[0]["path"] if self._wanted == "auto" else self._wanted
            device = parameters[0][0].device
            size = self._bindings.num_elements(torch.float32)
            try:
                path, kernels = choose_path(wanted or "auto", device, size)
            except ValueError:
                if self._wanted != "auto":
                    raise
                # A state from a machine that could take a path which this one cannot.
                path, kernels = choose_path("auto", device, size)
            # One rank without a compiler keeps all from it: they count updates together.
            alone = torch.tensor([kernels is None], dtype=torch.int64, device=device)
            if self._bindings.flags_anywhere(alone).item():
                path, kernels = "reference", None
            self._path = path
            self._fast = FastPath(kernels, self._merger) if kernels is not None else None
            for group in self.param_groups:
                group["path"] = path
        return self._fast


def _is_anchored(group: dict[str, Any]) -> bool:
    """Whether a group merges only once in several steps."""
    return bool(group["merge"] and group["merge_every"] > 1)
