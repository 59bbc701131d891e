"""OnDARE and OnTIES around AdamW (Lu et al. 2024); the equations are in operators.optim.merger."""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from operators.kernels.choice import IMPLEMENTATIONS, Implementation, optimizer_kernels
from operators.optim.adamw import AdamWStep, moments, new_state
from operators.optim.base import AnyTau, Nonfinite, OnlineMergingBase, Stepped
from operators.optim.fast import FastPath, FastUpdate
from operators.optim.layout import ShardLayout, local, local_gradient
from operators.optim.options import (
    NAMED_PAIRS,
    AlphaSchedule,
    MergeOptions,
    Rounding,
    check_adamw,
    check_choice,
)
from operators.optim.tau import DeltaPlacement, MissingDelta
from operators.optim.update import GRADIENT_STREAM, Update
from operators.sparsify import Rescale, bernoulli

NamedParameters = Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
_OLD_NAMES = {"reference": "eager"}  # renamed implementations
_LOG = logging.getLogger(__name__)


class OnlineMergingAdamW(OnlineMergingBase):
    """AdamW that merges each update with the reference delta `tau = theta_ref - theta_base`, the
    change made by the earlier fine-tuning. A small part of tau in each step keeps the model close
    to its earlier abilities.

        from operators.optim import OnlineMergingAdamW
        from pipelines.checkpoints import CheckpointDelta

        tau = CheckpointDelta("base", "sft")  # two checkpoints, read by slice
        optimizer = OnlineMergingAdamW(
            model.named_parameters(), tau, lr=1e-6, consensus="ties", density=0.5, alpha=1e-4
        )

    Args:
        named_parameters: `model.named_parameters()`, or groups of them (`{"params": [(name,
            tensor), ...], ...}`), as torch's optimizers take them. Plain tensors, or DTensors
            sharded by rows. A group may have its own value of every option up to `seed`;
            `"merge": False` makes it plain AdamW.
        reference_delta: tau by parameter name, or a `DeltaSource` such as
            `pipelines.checkpoints.CheckpointDelta`; None is allowed if alpha is 0.
        lr, betas, eps, weight_decay: as `torch.optim.AdamW`.
        consensus: `dare` (random masks, sum) or `ties` (largest magnitudes, sign consensus); with
            `sparsifier`, a name of `operators.consensus.CONSENSUS`.
        density: p in (0, 1], the fraction kept of update and tau.
        alpha: a in [0, 1), the weight of tau.
        merge_every: K >= 1, merge once in K steps (step-K); call `merge_pending()` at the end.
        rescale: divide the randomly kept elements by the density (the paper does not).
        rounding: how parameters are rounded. `stochastic` keeps small updates on average;
            bfloat16 and float16 parameters need it.
        alpha_schedule: `constant`, or `lr`: alpha in proportion to the learning rate.
        gradient_density, gradient_rescale: ChildTuning-F: keep a random share of the gradient for
            the moments, and divide it by the share.
        seed: of the masks and of the rounding.
        missing_delta: if a parameter has no tau of its shape: `error`; `zero_rows` takes missing
            rows of tau as zero; `exclude` does not merge the parameter's updates.
        delta_placement: keep tau on the parameter's `device`, on the `host`, or read it from its
            `source` at every use.
        delta_dtype: of the kept tau: bfloat16 or float32.
        nonfinite: a gradient with Inf or NaN raises an error (`raise`), or all ranks skip the step
            (`skip`); in both cases nothing has changed.
        implementation: `eager`, `compiled` (C) or `triton`; `auto` chooses by size and device, logs
            the choice once, and keeps it on resumption.
        sparsifier, sparsifier_parameters: a name of `operators.sparsify.SPARSIFIERS`, and its
            parameters other than density and rescale. Pairs other than OnDARE's and OnTIES' take
            the eager path.

    With density 1 and alpha 0 the eager path has the same bits as torch's AdamW (`foreach=False,
    fused=False`). Masks and thresholds depend on global indices, so they are the same under any
    sharding.

    Raises:
        ValueError: a value out of range or without effect, an unnamed parameter, a dtype that
            `rounding` does not support, a parameter whose tau is missing or has another shape, or a
            sharding that splits rows where the sparsifier needs whole rows.
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        reference_delta: AnyTau,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        consensus: str = "dare",
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
        sparsifier: str | None = None,
        sparsifier_parameters: Mapping[str, Any] | None = None,
    ) -> None:
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            **options.in_group(),
            "gradient_density": gradient_density,
            "gradient_rescale": gradient_rescale,
            "path": None,
        }
        self._wanted = _renamed(implementation)
        check_choice("implementation", self._wanted, IMPLEMENTATIONS)
        self._path: str | None = None
        self._fast: FastPath | None = None
        self._prepare(reference_delta, missing_delta, delta_placement, delta_dtype, nonfinite)
        super().__init__(named_parameters, defaults)

    @property
    def path(self) -> str | None:
        """The path: eager, compiled or triton; None before the first step."""
        return self._path

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_adamw(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; parameters without a gradient stay unchanged.

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
        options = {id(group): self._options(group) for group in self.param_groups}
        if self._is_rehearsal(parameters):
            for parameter, group in parameters:
                anchored = options[id(group)].is_anchored
                self.state[parameter].update(new_state(parameter, anchored=anchored))
            return loss
        fast = self._fast_path(parameters)
        begun = [self._begin(p, group, options[id(group)]) for p, group in parameters]
        quick = [
            one
            for one, (p, group) in zip(begun, parameters, strict=True)
            if fast is not None and self._goes_fast(p, group, options[id(group)])
        ]
        chosen = {id(one) for one in quick}
        updates = [
            self._advance(one, group)
            for one, (_, group) in zip(begun, parameters, strict=True)
            if id(one) not in chosen
        ]
        due = [(p, options[id(group)]) for p, group in parameters]
        due = [(p, own) for p, own in due if self._is_due(p, own)]
        if due or updates or any(one.counting for one in quick):
            self._merger.forget_counts()
        if fast is not None:
            fast.step(quick)
        self._merger.merge(updates)
        self._merge_from_anchors([self._since_anchor(p, own) for p, own in due])
        return loss

    def _first_not_finite(self, gradients: list[Tensor]) -> int | None:
        """Position of the first gradient with Inf or NaN, by the fused passes if there are any."""
        if self._fast is None:
            return super()._first_not_finite(gradients)
        return self._fast.first_not_finite(gradients)

    def _is_due(self, parameter: Tensor, options: MergeOptions) -> bool:
        """Whether step-K merges after this step."""
        steps = self._steps_of(self.state[parameter])
        return options.is_anchored and steps % int(options.merge_every) == 0

    def _begin(self, parameter: Tensor, group: dict[str, Any], options: MergeOptions) -> FastUpdate:
        """Count a parameter's step and make its update; its moments are not yet advanced.

        With step-K this update is not merged: theta takes a plain step.
        """
        state, anchored = self.state[parameter], options.is_anchored
        if not state:
            state.update(new_state(parameter, anchored=anchored))
        state["step"] += 1
        numbers = AdamWStep.of(group, self._steps_of(state))
        mean, square = moments(state)

        def delta(at: slice) -> Tensor:
            return numbers.delta(mean[at], square[at])

        update = self._update(parameter, options, delta)
        if anchored:
            local(state["anchor"]).mul_(numbers.decay)
            update.merged = [False] * len(update.layouts)
        return FastUpdate(update, numbers, local_gradient(parameter), mean, square)

    def _advance(self, begun: FastUpdate, group: dict[str, Any]) -> Update:
        """Advance the moments, apply the decay, and return AdamW's update."""
        update, numbers = begun.update, begun.numbers
        stochastic = update.options.rounding == "stochastic"
        if stochastic:
            update.decay = numbers.decay
        for layout in update.layouts:
            for start, at in layout.chunks():
                gradient = self._gradient(begun, group, layout, start, at)
                numbers.advance(begun.mean[at], begun.square[at], gradient)
                if not stochastic:
                    update.theta[at].mul_(numbers.decay)
        return update

    def _gradient(
        self,
        begun: FastUpdate,
        group: dict[str, Any],
        layout: ShardLayout,
        start: int,
        at: slice,
    ) -> Tensor:
        """A chunk of the gradient, unscaled and after gradient dropout, in the moments' dtype."""
        gradient, density = begun.gradient[at].to(begun.mean.dtype), group["gradient_density"]
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            gradient = gradient / scale.to(gradient.device)
        if density < 1:
            rescale: Rescale = "inverse_density" if group["gradient_rescale"] else "none"
            key = begun.update.key(layout, GRADIENT_STREAM)
            gradient = bernoulli(gradient, density, key, start, rescale)
        return gradient

    def _goes_fast(self, parameter: Tensor, group: dict[str, Any], options: MergeOptions) -> bool:
        """Whether the fused passes support a parameter's step; the same on every rank."""
        assert parameter.grad is not None
        return (
            parameter.dtype == parameter.grad.dtype == torch.float32
            and options.rounding == "nearest"
            and options.has_fused_passes
            and group["gradient_density"] == 1
            and getattr(self, "grad_scale", None) is None
        )

    def _fast_path(self, parameters: Stepped) -> FastPath | None:
        """The fused passes, chosen at the first call; None on the eager path."""
        if self._path is None and parameters:
            saved = self.param_groups[0]["path"]
            wanted = self._wanted
            if wanted == "auto" and saved is not None:
                wanted = _OLD_NAMES.get(saved, saved)
            device = parameters[0][0].device
            size = self._bindings.num_elements(torch.float32)
            try:
                path, kernels = optimizer_kernels(wanted, device, size)
            except ValueError:
                if self._wanted != "auto":
                    raise
                # The state is from a machine with a path that this machine does not have.
                path, kernels = optimizer_kernels("auto", device, size)
            # If one rank has no compiler, all take the eager path, because they search together.
            alone = torch.tensor([kernels is None], dtype=torch.int64, device=device)
            if self._bindings.flags_anywhere(alone).item():
                path, kernels = "eager", None
            self._path = path
            self._fast = FastPath(kernels, self._merger) if kernels is not None else None
            self._say_eager_pairs()
        for group in self.param_groups:
            group["path"] = self._path  # a loaded state may name another path
        return self._fast

    def _say_eager_pairs(self) -> None:
        """Log the pairs that have no fused passes, unless everything is eager."""
        if self._fast is None:
            return
        for names in sorted({self._options(group).names for group in self.param_groups}):
            if names not in NAMED_PAIRS.values():
                _LOG.info("online merging: %s with %s takes the eager path", *names)


def _renamed(implementation: str) -> str:
    """An implementation's current name; an old name logs a warning."""
    if implementation in _OLD_NAMES:
        new = _OLD_NAMES[implementation]
        _LOG.warning("implementation: %r is called %r now", implementation, new)
        return new
    return implementation
