"""The checkpoint that a reward model starts from: one that is a reward model, or a causal language
model's, whose own head a new one replaces.

Nothing is written: the checkpoint is that of the source's files with another config, and the few
values of the new head are made when they are read, on every worker the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.checkpoints import Checkpoint, ModuleView
from pipelines.checkpoints.safetensors_header import StoredTensor
from pipelines.errors import InputError
from pipelines.train.architecture import (
    RewardHead,
    is_reward_model,
    meta_model,
    tokenizer_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORE = "score.weight"


@dataclass(frozen=True, slots=True)
class RewardStart(Checkpoint):
    """A checkpoint with a new head of one label.

    Attributes:
        seed, spread: of the head's values, which are normally distributed around 0.
    """

    seed: int
    spread: float

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As `Checkpoint.read`; the head's values are drawn."""
        if name != SCORE:
            return Checkpoint.read(self, name, start, stop)
        head = self.tensors[name]
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.empty(head.num_elements).normal_(0, self.spread, generator=generator)
        return values.to(head.dtype)[start:stop]


def reward_start(source: Checkpoint, model: "PreTrainedModel", head: RewardHead) -> Checkpoint:
    """The checkpoint to start from.

    Args:
        source: as it lies.
        model: of the head's kind, on the meta device.

    Raises:
        InputError: a tokenizer without a token to pad with.
    """
    if is_reward_model(source.config.get("architectures")):
        return Checkpoint(source.path, _with_padding(source), source.tensors)
    naming = ModuleView.of(source, model).naming
    if naming.missing != [SCORE]:
        return source  # which lacks more than the head: the caller says what
    kept = {n: tensor for n, tensor in source.tensors.items() if n not in naming.unexpected}
    config = _with_padding(source, own=False) | {
        "architectures": [type(model).__name__],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "problem_type": "regression",  # raw scores, for what reads it (transformers' pipeline)
    }
    config.pop("num_labels", None)
    dtype = next(t.dtype for t in kept.values() if t.dtype.is_floating_point)
    shape = tuple(model.get_parameter(SCORE).shape)
    tensors = kept | {SCORE: StoredTensor(SCORE, dtype, shape, source.path / "config.json", 0)}
    spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    return RewardStart(source.path, config, tensors, head.seed, spread)


def pad_token(config: dict[str, Any]) -> int | None:
    """The token that pads the sequences of a model."""
    found: int | None = (config.get("text_config") or config).get("pad_token_id")
    return found


def _with_padding(source: Checkpoint, *, own: bool = True) -> dict[str, Any]:
    """The config with the token by which the model finds a sequence's end.

    Args:
        own: the config's, if it has one; else the tokenizer's, or what ends its texts, as TRL has
            it.
    """
    config = source.config
    if own and pad_token(config) is not None:
        return config
    tokenizer = tokenizer_of(source.path)
    found = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    pad = next((token for token in found if token is not None), None)
    if pad is None:
        raise InputError(
            f"model {source.path}: its tokenizer has no token that pads or ends texts, by which a "
            "reward model finds a sequence's end"
        )
    given = {"pad_token_id": pad}
    if "text_config" in config:
        given |= {"text_config": config["text_config"] | given}
    return config | given


def what_changes(path: Path, head: RewardHead) -> Iterator[str]:
    """Lines on what a model becomes where it is no reward model yet."""
    source = Checkpoint.open(path)
    start = reward_start(source, meta_model(path, head), head)
    if SCORE in source.tensors:
        return
    without = [name for name in source.tensors if name not in start.tensors]
    instead = f" in place of {', '.join(without[:3])}" if without else ""
    more = f" and {len(without) - 3} more" if len(without) > 3 else ""
    yield f"{path}: becomes a reward model, with a new head ({SCORE}, drawn by seed){instead}{more}"
