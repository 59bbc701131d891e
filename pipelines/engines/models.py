"""Which checkpoints an engine can run, checked before anything is loaded."""

from difflib import get_close_matches
from typing import Any

from pipelines.engines.config import EngineConfig
from pipelines.engines.weights import Weights
from pipelines.errors import InputError

UNBOUNDED = 1 << 30
REWARD_SUFFIX = "ForSequenceClassification"
_LISTED = 20  # labels in a message


def check_kind(weights: Weights, config: EngineConfig) -> None:
    """Raise InputError for a model of another kind than the engine's, as its config.json says."""
    [name, *_] = weights.config.get("architectures") or [""]
    place = f"model {weights.name}: config.json: "
    if config.kind == "generate":
        if not _is_causal(name, weights.config):
            raise InputError(
                f"{place}architectures: found {name or 'none'}; allowed: a causal language model"
            )
        return
    if not str(name).endswith(REWARD_SUFFIX):
        raise InputError(
            f"{place}architectures: found {name or 'none'}; allowed: a sequence classification "
            "model"
        )
    head_of(weights.config, config.head, place)


def head_of(config: dict[str, Any], wanted: str | int | None, place: str = "") -> int:
    """The number of the label whose scores are the rewards.

    Args:
        config: a sequence classification model's config.json.
        wanted: a label's name or number; None where the model has one label.
        place: the beginning of the message.

    Raises:
        InputError: several labels and none chosen, or one that the model does not have.
    """
    names = label_names(config)
    listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    if wanted is None:
        if len(names) != 1:
            raise InputError(
                f"{place}found {len(names)} labels ({listed}); allowed: 1 in a reward model, or "
                "head: a label's name or number"
            )
        return 0
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    is_number = isinstance(wanted, int) or wanted.isdecimal()
    if is_number and 0 <= int(wanted) < len(names):
        return int(wanted)
    near = get_close_matches(str(wanted), names, 3, 0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InputError(
        f"{place}head: found {wanted!r}; allowed: 0 to {len(names) - 1}, or {listed}{hint}"
    )


def label_names(config: dict[str, Any]) -> list[str]:
    """The labels of a sequence classification model by their numbers."""
    labels = config.get("id2label") or {}
    return [
        str(labels.get(str(number), labels.get(number, f"LABEL_{number}")))
        for number in range(num_labels(config))
    ]


def num_labels(config: dict[str, Any]) -> int:
    """The labels of a sequence classification model; transformers' default is two."""
    labels = config.get("id2label")
    return int(config.get("num_labels") or 2) if labels is None else len(labels)


def context_of(model: dict[str, Any], config: EngineConfig) -> int:
    """The most tokens that a model reads, at most what the engine's config allows.

    Raises:
        InputError: the config allows more than the model reads.
    """
    settings = model.get("text_config") or model
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    most = next((int(settings[name]) for name in names if settings.get(name)), UNBOUNDED)
    if config.max_length is not None and config.max_length > most:
        raise InputError(
            f"engine.max_length: found {config.max_length}; allowed: up to {most}, which the "
            "model reads"
        )
    return config.max_length or most


def _is_causal(name: str, config: dict[str, Any]) -> bool:
    """Whether transformers' table of causal models has the class; where the checkpoint names none,
    the type of its model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name:
        return name in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
