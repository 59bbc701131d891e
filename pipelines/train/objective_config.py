"""The `objective` of a config: a loss or a sum of losses, with their parameters."""

from typing import Annotated

from pydantic import Field, PositiveFloat, model_validator

from operators.losses import OBJECTIVES, Objective
from pipelines.config import Config, NamedIn
from pipelines.train.row_kinds import ROW_KINDS, RowKind

Loss = Annotated[str, NamedIn(OBJECTIVES)]


class ObjectiveConfig(Config):
    """The loss, or a weighted sum of losses, and its parameters, named as in TRL; None means the
    loss's default.
    """

    name: Loss | list[Loss] = Field("dpo", description="the loss; a list: the sum of several")
    loss_weights: list[PositiveFloat] | None = Field(
        None, description="weights of the losses of a sum; 1 each unless given"
    )
    beta: float | None = Field(None, gt=0, description="strength of the pull to the reference")
    label_smoothing: float | None = Field(
        None, ge=0, lt=0.5, description="share of wrong labels (dpo, robust)"
    )
    rpo_alpha: float | None = Field(None, ge=0, description="weight of the likelihood term (dpo)")
    simpo_gamma: float | None = Field(None, ge=0, description="target margin (simpo)")
    desirable_weight: float | None = Field(None, gt=0, description="of desirable rows (kto)")
    undesirable_weight: float | None = Field(None, gt=0, description="of undesirable rows (kto)")

    center_rewards_coefficient: float | None = Field(
        None, ge=0, description="weight of the squared sum of a pair's rewards (reward)"
    )

    @model_validator(mode="after")
    def _losses_that_add_up(self) -> "ObjectiveConfig":
        names, weights = self.names, self.loss_weights
        if isinstance(self.name, str):
            if weights is not None:
                raise ValueError(f"loss_weights: has no effect on {self.name}; allowed with a list")
            return self
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"name: found {names}; allowed: one name, or a list of different ones")
        addable = [name for name, value in OBJECTIVES.items() if value.can_be_added]
        for name in names:
            if name not in addable:
                raise ValueError(f"name: found {name!r} in a sum; allowed: {', '.join(addable)}")
        if weights is not None and len(weights) != len(names):
            raise ValueError(
                f"loss_weights: found {len(weights)}; allowed: {len(names)}, one for each name"
            )
        return self

    @model_validator(mode="after")
    def _parameters_where_they_act(self) -> "ObjectiveConfig":
        takes = {name for _, objective in self.terms for name in objective.parameters}
        parameters = {name for objective in OBJECTIVES.values() for name in objective.parameters}
        for name in type(self).model_fields:
            if name in parameters and getattr(self, name) is not None and name not in takes:
                users = [key for key, value in OBJECTIVES.items() if name in value.parameters]
                raise ValueError(
                    f"{name}: has no effect on {self.label}; allowed with {', '.join(users)}"
                )
        return self

    @property
    def names(self) -> list[str]:
        """The names of all losses."""
        return [self.name] if isinstance(self.name, str) else self.name

    @property
    def label(self) -> str:
        """The objective in words: its name, or the names of a sum."""
        return " + ".join(self.names)

    @property
    def terms(self) -> list[tuple[float, Objective]]:
        """The losses with their weights."""
        weights = self.loss_weights or [1.0] * len(self.names)
        return [(w, OBJECTIVES[name]) for w, name in zip(weights, self.names, strict=True)]

    @property
    def definition(self) -> Objective:
        """The objective's entry in the table; that of the first loss on pairs of a sum."""
        entries = [objective for _, objective in self.terms]
        return next((entry for entry in entries if entry.rows == "pairs"), entries[0])

    @property
    def row_kind(self) -> RowKind:
        """The kind of rows that the objective needs."""
        return ROW_KINDS[self.definition.rows]

    @property
    def parameters(self) -> dict[str, float]:
        """All parameters of the losses: given values or defaults."""
        defaults = {name: v for _, entry in self.terms for name, v in entry.parameters.items()}
        given = {name: getattr(self, name) for name in defaults}
        return {name: defaults[name] if v is None else v for name, v in given.items()}

    @property
    def learns_equal_pairs(self) -> bool:
        """Whether pairs of equal responses are of use: a likelihood was added to preferences."""
        adds_sft = len(self.terms) > 1 and any(entry.loss is None for _, entry in self.terms)
        return bool(self.rpo_alpha) or adds_sft
