"""Models for the tests of engines."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForSequenceClassification

from tests.pipelines.engines.references import save_chatty
from tests.tiny_models import save_tiny, save_tiny_gpt2


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two causal models of the same shapes, a reward model, a GPT-2; never changed."""
    root = tmp_path_factory.mktemp("engines")
    reward = {"num_labels": 1, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}
    return {
        "a": save_chatty(root / "a", 1),
        "b": save_chatty(root / "b", 2),
        "tied": save_chatty(root / "tied", 3, tied=True),
        "gpt2": save_tiny_gpt2(root / "gpt2", 4),
        **{
            name: save_tiny(
                LlamaForSequenceClassification,
                root / name,
                seed,
                dtype=torch.float32,
                **reward,
                **heads,
            )
            for name, seed in (("reward", 5), ("reward2", 6))
        },
    }
