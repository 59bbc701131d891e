"""The models to serve, checked on disk before anything starts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.checkpoints.hub import folder_of
from pipelines.engines.vllm_requests import head_size, vllm_device
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
        has_template: whether it has a chat template.
    """

    name: str
    path: Path
    dtype: str
    head_size: int | None
    has_template: bool = True


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
        model = look_at(path)
        if not model.has_template:
            raise InputError(
                f"model {path}: its tokenizer has no chat template; "
                "expected chat_template.jinja beside it, or the field in tokenizer_config.json"
            )
        if model.name in models:
            raise InputError(
                f"model {path}: its name {model.name!r} is taken by {models[model.name].path}; "
                "models served together need folders of different names"
            )
        models[model.name] = model
    return list(models.values())


def look_at(path: Path) -> ServedModel:
    """One checkpoint, checked without loading its weights.

    Raises:
        InputError: a missing directory, damaged files, or a tokenizer that does not load.
    """
    folder = folder_of(path).expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"model {path}: no such directory; expected a Hugging Face checkpoint")
    config = _read_config(path, folder / "config.json")
    _check_weights(path, folder)
    has_template = _has_chat_template(path, folder)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ServedModel(
        name=folder.name if (found := snapshot_of(folder)) is None else found[0].name,
        path=folder,
        dtype=dtype if dtype in SERVED_DTYPES else "auto",
        head_size=head_size(config),
        has_template=has_template,
    )


def engine_device() -> str:
    """The device of the installed vLLM build: "gpu" or "cpu".

    Raises:
        InputError: vLLM is not installed.
    """
    return "cpu" if vllm_device("serve: vLLM") == "cpu" else "gpu"


def check_servable(models: list[ServedModel], device: str) -> None:
    """Refuse models that the engine would load but could not run.

    Raises:
        InputError: a head size that vLLM's CPU attention does not support.
    """
    if device != "cpu":
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    allowed = CPUAttentionBackend.get_supported_head_sizes()
    for model in models:
        if model.head_size is not None and model.head_size not in allowed:
            raise InputError(
                f"model {model.path}: config.json: attention heads of {model.head_size}; "
                f"vLLM on the CPU serves {', '.join(map(str, allowed))}"
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


def _has_chat_template(path: Path, folder: Path) -> bool:
    """Whether the tokenizer has one: without it a model answers no chat."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {path}: its tokenizer does not load: {first}") from None
    return bool(tokenizer.chat_template)
