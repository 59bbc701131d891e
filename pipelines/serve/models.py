"""The models to serve, checked on disk before anything starts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.checkpoints.hub import folder_of
from pipelines.engines.vllm_requests import head_size
from pipelines.errors import InputError
from pipelines.hub.cache import snapshot_of

# The dtypes that vLLM computes in; for other checkpoints vLLM chooses.
SERVED_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A finished checkpoint, as a server needs to know it.

    Attributes:
        name: its name in requests: the name of its folder, or the hub's without the organisation.
        path: the absolute checkpoint directory.
        dtype: of its weights; "auto" if the config names none that vLLM serves.
        head_size: elements of one attention head; None if the config does not give it.
    """

    name: str
    path: Path
    dtype: str
    head_size: int | None


def find_models(paths: list[Path]) -> list[ServedModel]:
    """The models in the given checkpoint directories, in their order.

    Raises:
        InputError: no path; a missing directory or an incomplete chat checkpoint; two directories
            with the same name.
    """
    if not paths:
        raise InputError("serve: no model given; expected the path of at least one checkpoint")
    models: dict[str, ServedModel] = {}
    for path in paths:
        model = _look_at(path)
        if model.name in models:
            raise InputError(
                f"model {path}: its name {model.name!r} is taken by {models[model.name].path}; "
                "models served together need folders of different names"
            )
        models[model.name] = model
    return list(models.values())


def _look_at(path: Path) -> ServedModel:
    """One checkpoint, checked without loading its weights."""
    folder = folder_of(path).expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"model {path}: no such directory; expected a Hugging Face checkpoint")
    config = _read_config(path, folder / "config.json")
    _check_weights(path, folder)
    _check_chat_template(path, folder)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ServedModel(
        name=folder.name if (found := snapshot_of(folder)) is None else found[0].name,
        path=folder,
        dtype=dtype if dtype in SERVED_DTYPES else "auto",
        head_size=head_size(config),
    )


def _read_config(path: Path, file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"model {path}: no config.json; expected a Hugging Face checkpoint")
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"model {path}: config.json: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"model {path}: config.json: expected an object")
    return config


def _check_weights(path: Path, folder: Path) -> None:
    """Open every weight file; a truncated file contradicts its safetensors header."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"model {path}: no *.safetensors file; other formats are not loaded")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"model {path}: {file.name}: cannot be read: {error}") from None


def _check_chat_template(path: Path, folder: Path) -> None:
    """Raise InputError without a chat template: the model would start but refuse every chat."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {path}: its tokenizer does not load: {first}") from None
    if not tokenizer.chat_template:
        raise InputError(
            f"model {path}: its tokenizer has no chat template; "
            "expected chat_template.jinja beside it, or the field in tokenizer_config.json"
        )
