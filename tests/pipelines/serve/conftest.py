"""One server for the tests of HTTP: two models that share an engine, and two reward models."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from tests.pipelines.serve.local_server import LocalServer, local_server
from tests.tiny_models import save_tiny, save_tiny_llama

CONTEXT = 512
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}


def save_model(path: Path, seed: int) -> Path:
    """A tiny Llama whose greedy answers are long, varied and far from a tie."""
    return save_tiny_llama(path, seed, max_position_embeddings=CONTEXT, initializer_range=0.5)


def save_reward(path: Path, seed: int, labels: int = 1) -> Path:
    """A tiny reward model, or one with several labels."""
    fields = {**SIZES, "num_labels": labels, "initializer_range": 0.3}
    return save_tiny(LlamaForSequenceClassification, path, seed, dtype=torch.float32, **fields)


@pytest.fixture(scope="session")
def served_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by their names."""
    folder = tmp_path_factory.mktemp("served")
    found = {name: save_model(folder / name, seed) for seed, name in enumerate(["x", "y", "bare"])}
    (found["bare"] / "chat_template.jinja").unlink()
    found["reward"] = save_reward(folder / "reward", 7)
    found["many"] = save_reward(folder / "many", 8, labels=3)
    return found


@pytest.fixture(scope="session")
def served(
    served_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    """A running server of them all."""
    paths = {name: str(path) for name, path in served_models.items()}
    models = {
        "x": {"path": paths["x"]},
        "y": {"path": paths["y"]},
        "bare": {"path": paths["bare"], "share": False},
        "reward": {"path": paths["reward"], "kind": "reward"},
        "many": {"path": paths["many"], "kind": "reward", "head": 2},
    }
    limits = {"turn_s": 0.1, "max_n": 4, "max_tokens": 400, "body_timeout_s": 1, "max_batch": 64}
    folder = tmp_path_factory.mktemp("state")
    with local_server(models, folder, limits=limits) as server:
        yield server
