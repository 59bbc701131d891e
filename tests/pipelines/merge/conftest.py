"""Small checkpoints for merges: a base and models trained apart from it, with random steps."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_models import save_tiny_llama

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A base and three fine-tuned models of it; tests change copies, never these."""

    base: Path
    models: tuple[Path, ...]

    def config(self, method: str = "linear", **fields: object) -> dict[str, object]:
        """A merge's fields, as its YAML would have them; the base only where it is needed."""
        entries = [{"model": str(model)} for model in self.models]
        config: dict[str, object] = {"merge_method": method, "models": entries}
        if method not in ("linear", "m3_average"):
            config["base_model"] = str(self.base)
        return config | fields


def weights_of(path: Path) -> Tensors:
    """All tensors of a checkpoint of one file."""
    return load_file(path / "model.safetensors")


def save_weights(path: Path, tensors: Tensors) -> None:
    """Replace a checkpoint's tensors."""
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def fine_tune(base: Path, path: Path, seed: int) -> Path:
    """A copy of `base` with small random steps, as training would make them."""
    path.mkdir(parents=True)
    for file in base.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = weights_of(base)
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype), alpha=0.01)
    save_weights(path, tensors)
    return path


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """float32 checkpoints of 20 thousand parameters."""
    return make_family(tmp_path_factory.mktemp("family"))


def make_family(folder: Path, dtype: torch.dtype = torch.float32) -> Family:
    """A family of checkpoints in a folder."""
    base = save_tiny_llama(folder / "base", seed=0, dtype=dtype)
    models = tuple(fine_tune(base, folder / f"model-{i}", seed=i) for i in (1, 2, 3))
    return Family(base, models)


@pytest.fixture
def own_family(tmp_path: Path) -> Family:
    """A family that a test may damage."""
    return make_family(tmp_path / "inputs")


@pytest.fixture
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """Reads all files of a result but the provenance, which may name versions and paths."""

    def read(path: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}

    return read


def set_config(path: Path, **fields: object) -> None:
    """Change fields of a checkpoint's config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))
