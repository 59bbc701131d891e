"""The config of `poise expo`: a merge, one of its parameters, values, prompts, a reward model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config import Config
from pipelines.engines import EngineConfig
from pipelines.expo.bracket import needed_values
from pipelines.rewards.config import RewardEngine, reward_engine
from pipelines.rewards.rewarded import Decoding

# How ExPO's paper draws responses (Zheng et al. 2024, appendix F).
PAPER = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
}
_OF_SAMPLING = ("top_k", "top_p")  # have no effect at temperature 0
ALPHAS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]  # the paper's, and the aligned model itself
_DIGITS = 10  # of values by steps, so that 3 * 0.1 is 0.3


class Steps(Config):
    """Values from `low` to `high`, both with them."""

    section = "values."

    low: float
    high: float
    step: float = Field(gt=0)

    @model_validator(mode="after")
    def _rising(self) -> "Steps":
        if not self.low < self.high:
            raise ValueError(f"values: found low {self.low:g}, high {self.high:g}; allowed: rising")
        count = (self.high - self.low) / self.step
        if abs(count - round(count)) > 1e-6:
            raise ValueError(
                f"values: found {self.low:g} to {self.high:g} by {self.step:g}; allowed: a range "
                "of whole steps"
            )
        return self

    @property
    def listed(self) -> list[float]:
        """All of them."""
        count = round((self.high - self.low) / self.step)
        return [round(self.low + place * self.step, _DIGITS) for place in range(count + 1)]


class ExpoConfig(Config):
    """One parameter of a merge, chosen by a reward model."""

    merge: Path = Field(description="the merge's config")
    parameter: str = Field("parameters.alpha", description="its field, as in overrides")
    values: Steps | list[float] = Field(
        ALPHAS, description="what it may have: a list, or low, high, step; with alpha, 0 too"
    )
    reference: float | None = Field(
        None, description="the value that others are compared with; default 0 (alpha), else least"
    )
    search: Literal["grid", "bracket"] = Field(
        "grid", description="measure all values, or at most half of them around one peak"
    )
    reward: Path = Field(description="a sequence classification model, also by name on the hub")
    head: str | int | None = Field(
        None, description="name or number of the label that is the reward, if there are several"
    )
    reward_engine: RewardEngine = Field(default_factory=lambda: reward_engine({}))
    too_long: Literal["error", "cut_prompt"] = Field(
        "error", description="conversations that the reward model cannot read"
    )
    data: Path | dict[Literal["development", "test"], Path] = Field(
        description="rows with a prompt; one path is the development split"
    )
    columns: dict[Literal["prompt", "id", "cluster"], str] = Field(
        {}, description="what the data calls them"
    )
    limit: int | None = Field(None, ge=1, description="only so many prompts, from the first on")
    decoding: Decoding = Field(
        default_factory=lambda: Decoding.model_validate(PAPER),
        description="of responses; fields that are not given are the paper's",
    )
    max_new_tokens: int = Field(1024, ge=1, description="of a response")
    seed: int = Field(42, ge=0, description="of the responses")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="of the candidates")
    choose_on: Literal["development", "test"] = Field(
        "development", description="test: the test split decides, which marks all output"
    )
    split: Literal["development", "test"] | None = Field(None, description="the same as choose_on")
    storage: Path | None = Field(None, description="where relative outputs live")

    @field_validator("values", mode="before")
    @classmethod
    def _listed(cls, values: Any) -> Any:
        if isinstance(values, list):
            for each in values:
                if isinstance(each, bool) or not isinstance(each, int | float):
                    raise ValueError("a list of numbers, or low, high and step")
        elif not isinstance(values, Mapping | Steps):
            raise ValueError("a list of numbers, or low, high and step")
        return values

    @field_validator("decoding", mode="before")
    @classmethod
    def _as_the_paper(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        without = _OF_SAMPLING if given.get("temperature") == 0 else ()
        return {name: of for name, of in PAPER.items() if name not in without} | dict(given)

    @model_validator(mode="after")
    def _fits_together(self) -> "ExpoConfig":
        listed = self.listed
        if len(set(listed)) < 2 or len(set(listed)) < len(listed):
            found = ", ".join(f"{each:g}" for each in listed) or "none"
            raise ValueError(f"values: found {found}; allowed: two or more different numbers")
        if self.split is not None and self.split != self.choose_on:
            raise ValueError(
                f"split: found {self.split}, choose_on: {self.choose_on}; allowed: development for "
                "both, or test for both, as numbers of the split that was chosen on are too high"
            )
        if isinstance(self.data, Mapping) and len({*self.data.values()}) < len(self.data):
            raise ValueError("data: development and test: found one path; allowed: other prompts")
        if self.engine.kind != "generate":
            raise ValueError("engine.kind: found reward; allowed: generate")
        greedy = self.decoding.temperature == 0
        if greedy and "seed" in self.model_fields_set:
            raise ValueError("seed: has no effect at temperature 0")
        return self

    @property
    def listed(self) -> list[float]:
        """The values as the config has them."""
        return self.values.listed if isinstance(self.values, Steps) else list(self.values)

    def all_values(self, is_alpha: bool) -> tuple[list[float], float]:
        """The values in rising order, and the one that the others are compared with.

        Args:
            is_alpha: the parameter is ExPO's alpha, of which 0 is the aligned model.

        Raises:
            ValueError: too few for `search: bracket`.
        """
        reference = self.reference
        if reference is None:
            reference = 0.0 if is_alpha else min(self.listed)
        found = sorted({*self.listed, reference, *([0.0] if is_alpha else [])})
        if self.search == "bracket":
            needed = needed_values(found.index(reference) in (0, len(found) - 1))
            if len(found) < needed:
                raise ValueError(
                    f"search: bracket: found {len(found)} values; allowed: {needed} or more, as "
                    "of fewer it would measure more than half"
                )
        return found, reference
