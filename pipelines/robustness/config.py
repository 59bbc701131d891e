"""The config of an attack on a task's prompt."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pipelines.config import Config
from pipelines.robustness.search import Ranking

AttackName = Literal["deepwordbug", "bertattack", "substitution", "stresstest"]
_OF_WORDS = ("deepwordbug", "bertattack", "substitution")
_OF_CANDIDATES = ("bertattack", "substitution")
# Fields that not every attack reads, with those that do.
_READ_BY: dict[str, tuple[str, ...]] = {
    "seed": _OF_WORDS,
    "words": _OF_WORDS,
    "ranking": _OF_WORDS,
    "protect": _OF_WORDS,
    "max_queries": _OF_WORDS,
    "max_edits": ("deepwordbug",),
    "source": ("deepwordbug", "substitution"),
    "model": ("bertattack",),
    "mask": ("bertattack",),
    "candidates": _OF_CANDIDATES,
    "encoder": _OF_CANDIDATES,
    "min_cosine": _OF_CANDIDATES,
}


class AttackConfig(Config):
    """One attack on the prompt of one task."""

    section = "attacks."

    attack: AttackName
    task: str = Field(description="name of a task of this evaluation")
    name: str | None = Field(
        None, pattern=r"^[^/\s]+$", description="in results; default TASK+ATTACK"
    )
    metric: str | None = Field(
        None, description="of the task, which is to fall; default the only one"
    )
    seed: int = Field(1, ge=0, description="of the words that are drawn, and of edits")
    words: int = Field(3, ge=1, description="how many words are attacked")
    ranking: Ranking = Field(
        "random", description="which words: drawn, or by what the metric loses without them"
    )
    protect: list[str] = Field([], description="words that stay, beside those of the labels")
    max_queries: int | None = Field(
        None, ge=1, description="prompts asked at most, beside the unattacked one"
    )
    max_edits: int = Field(30, ge=1, description="characters that change at most (Levenshtein)")
    source: str | None = Field(
        None, description="file, folder of WordNet, or nlpaug:keyboard, nlpaug:ocr, nlpaug:spelling"
    )
    model: Path | None = Field(None, description="checkpoint of a masked language model")
    mask: bool = Field(False, description="mask the word, as in BAE; else it is read in its place")
    candidates: int = Field(2, ge=1, description="words tried in place of one")
    encoder: Path | None = Field(None, description="checkpoint of a sentence encoder")
    min_cosine: float = Field(
        0.8, gt=-1, le=1, description="of the attacked prompt with the unattacked one"
    )

    @property
    def full_name(self) -> str:
        """The attacked task's name."""
        return self.name or f"{self.task}+{self.attack}"

    @model_validator(mode="after")
    def _has_effect(self) -> "AttackConfig":
        for field in self.model_fields_set:
            is_read = self.attack in _READ_BY.get(field, (self.attack,))
            if not is_read and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"attacks.{field}: has no effect with {self.attack}")
        for field, needing in (("source", "substitution"), ("model", "bertattack")):
            if self.attack == needing and getattr(self, field) is None:
                raise ValueError(f"attacks.{field}: required by {needing}")
        if self.encoder is None and self.min_cosine != 0.8:
            raise ValueError("attacks.min_cosine: has no effect without encoder")
        return self

    def identity(self) -> dict[str, Any]:
        """What results depend on, but for the content of files."""
        return self.model_dump(mode="json", exclude={"name", "task", "source", "model", "encoder"})
