"""The options of online merging, which each parameter group may set, and their ranges."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from operators.consensus import CONSENSUS, Consensus
from operators.parameters import complete_parameters
from operators.sparsify import SPARSIFIERS, Needs, Sparsifier, check_density

Rounding = Literal["nearest", "stochastic"]
AlphaSchedule = Literal["constant", "lr"]
# OnDARE and OnTIES: the pairs with a name of their own and fused passes.
NAMED_PAIRS = {"dare": ("bernoulli", "sum"), "ties": ("top", "sign")}
_OWN = ("density", "rescale")  # parameters of sparsifiers that are also options


@dataclass(frozen=True)
class MergeOptions:
    """A group's merging options, and the learning rates that its alpha may follow.

    Attributes:
        sparsifier, consensus: names in their tables; without a sparsifier, `consensus` names a
            pair: `dare` or `ties`.
        sparsifier_parameters: the sparsifier's parameters other than density and rescale.
        merge: whether the group's updates are merged.

    `OnlineMergingAdamW` documents the others.
    """

    consensus: str = "dare"
    sparsifier: str | None = None
    sparsifier_parameters: Mapping[str, Any] = field(default_factory=dict)
    density: float = 1.0
    alpha: float = 1e-7
    merge_every: int = 1
    rescale: bool = False
    rounding: Rounding = "nearest"
    alpha_schedule: AlphaSchedule = "constant"
    seed: int = 0
    merge: bool = True
    lr: float = 0.0
    first_lr: float = 0.0

    @classmethod
    def of(cls, group: Mapping[str, Any], prefix: str = "") -> "MergeOptions":
        """The options in a parameter group; all keys except learning rates have the prefix."""
        keys = {one.name: prefix + one.name for one in fields(cls)}
        keys |= {"lr": "lr", "first_lr": "first_lr"}
        return cls(**{name: group[key] for name, key in keys.items() if key in group})

    def in_group(self, prefix: str = "") -> dict[str, Any]:
        """The options as keys of a group, without learning rates. If the consensus names the pair,
        there is no sparsifier either, as in states of earlier versions.
        """
        left_out = {"lr", "first_lr"}
        if self.sparsifier is None and not self.sparsifier_parameters:
            left_out |= {"sparsifier", "sparsifier_parameters"}
        names = [one.name for one in fields(self) if one.name not in left_out]
        return {prefix + name: getattr(self, name) for name in names}

    @cached_property
    def names(self) -> tuple[str, str]:
        """The names of sparsifier and consensus in their tables."""
        if self.sparsifier is None:
            return NAMED_PAIRS[self.consensus]
        return self.sparsifier, self.consensus

    @cached_property
    def sparsify(self) -> Sparsifier:
        """F, for the update and for tau."""
        return SPARSIFIERS[self.names[0]]

    @cached_property
    def needs(self) -> Needs:
        """The input that the sparsifier needs."""
        return self.sparsify.needs_with(self.keep_parameters)

    @cached_property
    def agree(self) -> Consensus:
        """⊕ of update and tau."""
        return CONSENSUS[self.names[1]]

    @cached_property
    def keep_parameters(self) -> dict[str, Any]:
        """Complete parameters of the sparsifier."""
        entry = self.sparsify
        given = dict(self.sparsifier_parameters)
        if "density" in entry.parameters:
            given["density"] = self.density
        if "rescale" in entry.parameters:
            given["rescale"] = "inverse_density" if self.rescale else "none"
        found = complete_parameters(entry.parameters, given, 1)
        return {n: v[0] if isinstance(v, list) else v for n, v in found.items()}

    @cached_property
    def merge_parameters(self) -> dict[str, Any]:
        """The parameters of the consensus: their defaults."""
        return {name: each.default for name, each in self.agree.parameters.items()}

    @property
    def current_alpha(self) -> float:
        """a of this step: constant, or times the learning rate / its first value."""
        if self.alpha_schedule == "lr":
            return float(self.alpha * self.lr / self.first_lr)
        return float(self.alpha)

    @property
    def has_fused_passes(self) -> bool:
        """Whether the fused passes support this pair and its options."""
        pair = self.names in NAMED_PAIRS.values()
        selects = self.names[0] != "top" or self.density < 1
        return pair and selects and not (self.rescale or self.sparsifier_parameters)

    @property
    def is_anchored(self) -> bool:
        """Whether the group merges only once in several steps."""
        return bool(self.merge and self.merge_every > 1)

    @property
    def changes_nothing(self) -> bool:
        """Whether a merge leaves updates unchanged."""
        whole = self.density == 1 and (self.sparsifier is None or self.sparsifier == "identity")
        return not self.merge or (whole and self.alpha == 0)

    def check(self, *, has_tau: bool) -> None:
        """Raise ValueError for options out of range, or without effect."""
        self._check_pair()
        check_choice("rounding", self.rounding, ("nearest", "stochastic"))
        check_choice("alpha_schedule", self.alpha_schedule, ("constant", "lr"))
        check_density(self.density)
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha: found {self.alpha}; allowed: at least 0 and below 1")
        if self.alpha > 0 and self.merge and not has_tau:
            raise ValueError(
                f"alpha: found {self.alpha} without a reference_delta; allowed: 0, or give one"
            )
        if self.merge_every < 1:
            raise ValueError(f"merge_every: found {self.merge_every}; allowed: 1 or more")
        if self.merge_every != int(self.merge_every):
            raise ValueError(f"merge_every: found {self.merge_every}; allowed: whole numbers")
        if self.alpha_schedule == "lr" and not self.first_lr > 0:
            raise ValueError(
                f"alpha_schedule: 'lr' divides by the first learning rate, found {self.first_lr}; "
                "allowed: an lr above 0"
            )
        self._check_sparsifier()

    def _check_pair(self) -> None:
        """Raise ValueError unless the names are a pair for online merging."""
        if self.sparsifier is None:
            check_choice("consensus", self.consensus, (*NAMED_PAIRS,))
            return
        check_choice("sparsifier", self.sparsifier, (*SPARSIFIERS,))
        online = tuple(name for name, each in CONSENSUS.items() if each.needs == "element")
        if self.consensus in CONSENSUS and self.consensus not in online:
            raise ValueError(
                f"consensus: found {self.consensus!r}, which draws once a merge; "
                f"allowed: {', '.join(map(repr, online))}"
            )
        check_choice("consensus", self.consensus, online)

    def _check_sparsifier(self) -> None:
        """Raise ValueError for options that the sparsifier does not take, or out of range."""
        name, entry = self.names[0], self.sparsify
        rescaled = entry.parameters.get("rescale")
        if self.rescale and self.sparsifier is None and self.consensus == "ties":
            raise ValueError("rescale: has no effect with consensus 'ties'; allowed with 'dare'")
        if self.rescale and (rescaled is None or rescaled.default == "none"):
            raise ValueError(f"rescale: has no effect with sparsifier {name!r}; allowed: false")
        if "density" not in entry.parameters and self.density != 1:
            raise ValueError(f"density: has no effect with sparsifier {name!r}; allowed: 1")
        for own in _OWN:
            if own in self.sparsifier_parameters:
                raise ValueError(f"sparsifier_parameters: {own}: give it as the option {own!r}")
        parameters = self.keep_parameters
        if parameters.get("scope") == "model":
            raise ValueError("scope: found 'model'; allowed in an optimizer: tensor, row")
        if entry.check is not None:
            entry.check(parameters)


def check_adamw(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a group's AdamW options out of range."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name}: found {group[name]}; allowed: 0 or more")
    for beta in group["betas"]:
        if not 0 <= beta < 1:
            raise ValueError(f"betas: found {beta}; allowed: at least 0 and below 1")
    if not 0 < group["gradient_density"] <= 1:
        raise ValueError(
            f"gradient_density: found {group['gradient_density']}; allowed: above 0 and at most 1"
        )


def check_dtype(name: str, parameter: Tensor, rounding: Rounding) -> None:
    """Raise ValueError for a parameter whose dtype the rounding does not support."""
    dtype = parameter.dtype
    if rounding == "nearest" and dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"parameter {name!r}: found {dtype}; updates as small as alpha * tau vanish in its "
            "rounding; allowed: float32 and float64 (master weights), or rounding='stochastic'"
        )
    if rounding == "stochastic" and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"parameter {name!r}: found {dtype}; rounding='stochastic' has no effect on it; "
            "allowed: float32, bfloat16 and float16"
        )


def check_choice(name: str, found: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `found` is one of the choices."""
    if found not in allowed:
        raise ValueError(f"{name}: found {found!r}; allowed: {', '.join(map(repr, allowed))}")


def names_of(group: dict[str, Any]) -> list[str]:
    """The names of a group's parameters, as torch keeps them.

    Raises:
        ValueError: the parameters were given without names.
    """
    if "param_names" not in group:
        raise ValueError("parameters: found unnamed ones; give model.named_parameters()")
    return list(group["param_names"])
