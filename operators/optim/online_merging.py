"""Online merging optimizers: each AdamW update is merged with a reference delta (Lu et al. 2024).

`delta` is what AdamW would add, without weight decay; `tau = theta_ref - theta_base`; a is alpha
and p the density. After the decoupled decay:

    OnDARE:  theta += (1 - a) B_p(delta) + a B'_p(tau)             fresh masks each step, no rescale
    OnTIES:  theta += ((1 - a) top_p(delta)) ⊕sign (a top_p(tau))
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from operators.consensus import sign_consensus
from operators.counter_random import counter_key, keep_mask
from operators.optim.delta import DeltaSource, MappingDelta
from operators.optim.layout import ShardLayout, layout_of, local, sum_over
from operators.sparsify import check_density, kept_count, top_cuts, top_mask

UPDATE_STREAM, TAU_STREAM = 0, 1  # streams of the counter hash
Consensus = Literal["dare", "ties"]
NamedParameters = Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


@dataclass(slots=True)
class _Update:
    """One parameter's step in flight: what is to be merged into it, and where it lies."""

    parameter: Tensor  # this rank's part, flat
    delta: Tensor  # (count,)
    layout: ShardLayout
    state: dict[str, Any]
    group: dict[str, Any]


class OnlineMergingAdamW(Optimizer):
    """AdamW whose updates are merged, step by step, with a reference delta.

    Args:
        named_parameters: `model.named_parameters()`, or groups of them (`{"params": [(name,
            tensor), ...], ...}`), as torch's optimizers take them. Plain tensors, or DTensors
            sharded by rows; float32 or float64.
        reference_delta: tau by parameter name, or a `DeltaSource`.
        lr, betas, eps, weight_decay: as `torch.optim.AdamW`.
        consensus: `dare` (random masks, sum) or `ties` (largest magnitudes, sign consensus).
        density: p in (0, 1], the fraction kept of update and tau.
        alpha: a in [0, 1), the weight of tau.
        merge_every: K >= 1, merge once in K steps (step-K); call `merge_pending()` at the end.
        seed: of the masks.

    With density 1 and alpha 0 it is torch's AdamW (`foreach=False, fused=False`) bit for bit. Masks
    and thresholds follow the global index, so they are the same under any sharding.

    Raises:
        ValueError: a value out of range, an unnamed or low-precision parameter, or a parameter
            whose tau is missing, of another shape or not finite.
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        reference_delta: Mapping[str, Tensor] | DeltaSource,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        consensus: Consensus = "dare",
        density: float = 1.0,
        alpha: float = 1e-7,
        merge_every: int = 1,
        seed: int = 0,
    ) -> None:
        self.consensus, self.merge_every, self.seed = consensus, merge_every, seed
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "density": density,
            "alpha": alpha,
        }
        _check_whole(consensus, merge_every)
        super().__init__(named_parameters, defaults)
        source = reference_delta
        self._source = MappingDelta(source) if isinstance(source, Mapping) else source
        self._layouts: dict[Tensor, ShardLayout] = {}
        self._tau: dict[str, Tensor] = {}  # never in a checkpoint: read again from its source
        for group in self.param_groups:
            _check_group(group)
            for name, parameter in zip(_names(group), group["params"], strict=True):
                self._layouts[parameter] = _checked_layout(name, parameter, self._source)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [
            self._adamw(parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if self.merge_every == 1:
            self._merge(updates)
        else:
            self._step_k(updates)
        return loss

    @torch.no_grad()
    def merge_pending(self) -> None:
        """Merge the tail of step-K that is shorter than K; nothing where no step is pending."""
        pending = []
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "anchor" in state and int(state["step"]) % self.merge_every:
                    pending.append(self._since_anchor(parameter, group))
        self._merge_from_anchors(pending)

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> _Update:
        """Advance the moments, apply the decay, and return what AdamW would add."""
        if parameter.grad is None or parameter.grad.is_sparse:
            name = self._layouts[parameter].name
            raise ValueError(f"parameter {name!r}: its gradient is sparse; allowed: dense ones")
        state = self.state[parameter]
        theta, gradient = local(parameter), local(parameter.grad)
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if self.merge_every > 1:
                state["anchor"] = parameter.detach().clone()
        lr, (beta1, beta2) = group["lr"], group["betas"]
        state["step"] += 1
        step = state["step"].item()
        decay = 1 - lr * group["weight_decay"]
        theta.mul_(decay)
        if "anchor" in state:
            local(state["anchor"]).mul_(decay)
        mean = local(state["exp_avg"]).lerp_(gradient, 1 - beta1)
        square = (
            local(state["exp_avg_sq"]).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        )
        denominator = (square.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        # In addcdiv's order of operations, so that `theta + delta` is torch's AdamW to the bit.
        delta = (mean * -(lr / (1 - beta1**step))).div_(denominator)
        return _Update(theta, delta, self._layouts[parameter], state, group)

    def _step_k(self, updates: list[_Update]) -> None:
        """Plain steps move theta; every K-th merges all that came since the anchor."""
        due = []
        for update in updates:
            update.parameter.add_(update.delta)
            if int(update.state["step"]) % self.merge_every == 0:
                update.delta = update.parameter - local(update.state["anchor"])
                due.append(update)
        self._merge_from_anchors(due)

    def _since_anchor(self, parameter: Tensor, group: dict[str, Any]) -> _Update:
        """All that plain steps have added since the last merge."""
        state, theta = self.state[parameter], local(parameter)
        delta = theta - local(state["anchor"])
        return _Update(theta, delta, self._layouts[parameter], state, group)

    def _merge_from_anchors(self, updates: list[_Update]) -> None:
        """theta = anchor + merge(delta), which is the next anchor."""
        for update in updates:
            update.parameter.copy_(local(update.state["anchor"]))
        self._merge(updates)
        for update in updates:
            local(update.state["anchor"]).copy_(update.parameter)

    def _merge(self, updates: list[_Update]) -> None:
        """Add the merged updates to the parameters."""
        if self.consensus == "dare":
            for update in updates:
                update.parameter.add_(self._dare(update))
        else:
            self._ties(updates)

    def _dare(self, update: _Update) -> Tensor:
        """`(1 - a) B_p(delta) + a B'_p(tau)`."""
        alpha = update.group["alpha"]
        merged = self._bernoulli(update.delta, UPDATE_STREAM, update)
        if alpha == 0:
            return merged
        tau = self._bernoulli(self._local_tau(update), TAU_STREAM, update)
        return merged.mul_(1 - alpha).add_(tau, alpha=alpha)

    def _bernoulli(self, x: Tensor, stream: int, update: _Update) -> Tensor:
        """x under a fresh mask of this step and stream, not rescaled."""
        layout, density = update.layout, update.group["density"]
        if density == 1:
            return x.clone()
        mask = keep_mask(self._key(update, stream), density, layout.start, layout.count, x.device)
        return torch.where(mask, x, 0.0)

    def _ties(self, updates: list[_Update]) -> None:
        """`((1 - a) top_p(delta)) ⊕sign (a top_p(tau))`, thresholds over all ranks at once."""
        self._prepare_top_tau(updates)
        tops = self._top([(u, u.delta) for u in updates], UPDATE_STREAM)
        for update, kept in zip(updates, tops, strict=True):
            alpha = update.group["alpha"]
            if alpha:
                tau = self._tau[update.layout.name]
                kept = sign_consensus(kept.mul_(1 - alpha), tau * alpha)
            update.parameter.add_(kept)

    def _prepare_top_tau(self, updates: list[_Update]) -> None:
        """top_p(tau) does not change, so it is found once."""
        new = [u for u in updates if u.group["alpha"] and u.layout.name not in self._tau]
        tops = self._top([(u, self._read_tau(u.layout)) for u in new], TAU_STREAM)
        for update, kept in zip(new, tops, strict=True):
            self._tau[update.layout.name] = kept.to(update.parameter.device)

    def _top(self, items: list[tuple[_Update, Tensor]], stream: int) -> list[Tensor]:
        """The top-p part of each tensor, exact over the whole parameter on all its ranks."""
        sparse = [i for i, (update, _) in enumerate(items) if update.group["density"] < 1]
        tops = [x.clone() for _, x in items]
        for group in dict.fromkeys(items[i][0].layout.group for i in sparse):
            chosen = [i for i in sparse if items[i][0].layout.group is group]
            layouts = [items[i][0].layout for i in chosen]
            keys = [self._key(items[i][0], stream) for i in chosen]
            counts = [
                kept_count(items[i][0].group["density"], layout.num_elements)
                for i, layout in zip(chosen, layouts, strict=True)
            ]
            parts = [(items[i][1], lay.start) for i, lay in zip(chosen, layouts, strict=True)]
            cuts = top_cuts(parts, counts, keys, partial(sum_over, group))
            for i, cut, key, (x, start) in zip(chosen, cuts, keys, parts, strict=True):
                tops[i] = torch.where(top_mask(x, cut, key, start), x, 0.0)
        return tops

    def _key(self, update: _Update, stream: int) -> tuple[int, int]:
        """The counter hash's key; top_p(tau) is constant, so its ties belong to no step."""
        constant = self.consensus == "ties" and stream == TAU_STREAM
        step = 0 if constant else int(update.state["step"])
        return counter_key(self.seed, update.layout.name, stream, step)

    def _local_tau(self, update: _Update) -> Tensor:
        """This rank's part of tau, read once."""
        key = update.layout.name
        if key not in self._tau:
            self._tau[key] = self._read_tau(update.layout).to(update.parameter.device)
        return self._tau[key]

    def _read_tau(self, layout: ShardLayout) -> Tensor:
        """This rank's part of tau from its source, checked to be finite."""
        tau = self._source.read(layout.name, layout.start, layout.start + layout.count)
        if not torch.isfinite(tau).all():
            raise ValueError(f"reference_delta: {layout.name!r} holds NaN or Inf")
        return tau


def _check_whole(consensus: str, merge_every: int) -> None:
    """Raise ValueError for what holds for all groups."""
    if consensus not in ("dare", "ties"):
        raise ValueError(f"consensus: found {consensus!r}; allowed: 'dare', 'ties'")
    if merge_every < 1:
        raise ValueError(f"merge_every: found {merge_every}; allowed: 1 or more")


def _check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for a parameter group's values out of range."""
    check_density(group["density"])
    if not 0 <= group["alpha"] < 1:
        raise ValueError(f"alpha: found {group['alpha']}; allowed: at least 0 and below 1")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name}: found {group[name]}; allowed: 0 or more")
    for beta in group["betas"]:
        if not 0 <= beta < 1:
            raise ValueError(f"betas: found {beta}; allowed: at least 0 and below 1")


def _names(group: dict[str, Any]) -> list[str]:
    """The names of a group's parameters."""
    if "param_names" not in group:
        raise ValueError("parameters: found unnamed ones; give model.named_parameters()")
    return list(group["param_names"])


def _checked_layout(name: str, parameter: Tensor, source: DeltaSource) -> ShardLayout:
    """A parameter's layout, once its tau and dtype are known to fit."""
    layout = layout_of(name, parameter)
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"parameter {layout.name!r}: found {parameter.dtype}; updates as small as alpha * tau "
            "vanish in its rounding; allowed: float32 and float64 (master weights)"
        )
    shape = source.shape(layout.name)
    if shape is None:
        raise ValueError(f"reference_delta: has no tensor for parameter {layout.name!r}")
    if shape != layout.shape:
        raise ValueError(
            f"reference_delta: {layout.name!r} has shape {shape}; the parameter's is {layout.shape}"
        )
    return layout
