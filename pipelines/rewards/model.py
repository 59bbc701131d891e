"""A reward model: which checkpoint, which of its labels, and the engine that runs it."""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.checkpoints.digests import ModelDigest, model_digest
from pipelines.checkpoints.hub import described, folder_of
from pipelines.engines import EngineConfig, open_engine
from pipelines.engines.models import check_kind, context_of, head_of, label_names
from pipelines.engines.text import Text
from pipelines.engines.weights import CheckpointWeights
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint

if TYPE_CHECKING:
    from pipelines.engines import Engine


@dataclass(frozen=True)
class RewardModel:
    """A sequence classification model with the label whose scores are the rewards.

    Attributes:
        weights: its headers.
        text: its tokenizer with the chat template.
        engine: with the label.
    """

    folder: Path
    weights: CheckpointWeights
    text: Text
    engine: EngineConfig

    @classmethod
    def open(cls, path: Path, head: str | int | None, engine: EngineConfig) -> "RewardModel":
        """Read the headers and the tokenizer.

        Raises:
            InputError: no sequence classification model, or no such label.
        """
        folder = folder_of(path)
        if not (folder / "config.json").is_file():
            raise InputError(f"model {path}: no Hugging Face checkpoint there")
        engine = engine.model_copy(update={"head": head})
        weights = CheckpointWeights.open(folder)
        check_kind(weights, engine)
        return cls(folder, weights, Text(weights, context_of(weights.config, engine)), engine)

    @property
    def head(self) -> int:
        """The number of the label."""
        return head_of(self.weights.config, self.engine.head)

    @property
    def parameters(self) -> int:
        """The elements of its tensors."""
        return sum(math.prod(shape) for _, shape in self.weights.tensors.values())

    @cached_property
    def digest(self) -> ModelDigest:
        """The digests of its weights, which are read for it, and of the files beside them."""
        return model_digest(self.weights.checkpoint)

    @property
    def key(self) -> str:
        """32 hex digits of all that the rewards of given conversations depend on: weights,
        tokenizer, chat template, label, and how the engine computes.
        """
        engine = self.engine.model_copy(update={"head": None}).identity  # `head` is its number
        template = self.text.tokenizer.chat_template
        return fingerprint([asdict(self.digest), self.head, template, engine])

    @property
    def described(self) -> dict[str, Any]:
        """The same in words, for records."""
        return {
            "path": described(self.folder),
            "digest": asdict(self.digest),
            "head": self.head,
            "label": label_names(self.weights.config)[self.head],
            "template": fingerprint(self.text.tokenizer.chat_template),
        }

    def start(self) -> "Engine":
        """An engine with the model.

        Raises:
            InputError: its weights have changed.
        """
        engine = open_engine(self.folder, self.engine)
        if engine.weights != self.digest.weights:
            engine.close()
            raise InputError(f"model {self.folder}: has changed since the start")
        return engine


def check_finite(reward: float, place: str) -> None:
    """Raise InputError for a reward that is no finite number."""
    if not math.isfinite(reward):
        raise InputError(
            f"{place}: found the reward {reward}; allowed: a finite number (engine.dtype: float32 "
            "has the widest range)"
        )
