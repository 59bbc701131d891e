"""Pairs of models of which no adapter is extracted. Oracle: messages written by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.errors import InputError
from pipelines.extract import extract
from tests.pipelines.extract.tuned_models import Change, config_of, linear_layers, tune
from tests.tiny_models import save_tiny_gpt2, save_tiny_llama


def nothing(name: str, tensor: Tensor) -> Tensor:
    return tensor


def no_number(name: str, tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([0]), float("nan")) if "layers.1" in name else tensor


def more_rows(name: str, tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor[:1]]) if "embed" in name else tensor


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (nothing, {}, "no linear layer differs from"),
        (
            no_number,
            {},
            r"model.layers.1.input_layernorm.weight: holds NaN or Inf; allowed: finite",
        ),
        (more_rows, {}, r"embed_tokens.weight: found shape \[48, 32\]; allowed: \[47, 32\], as in"),
        (
            linear_layers,
            {"whole": ["heads"]},
            "whole: found 'heads'; allowed: down_proj, embed_tok",
        ),
        (
            lambda name, tensor: linear_layers(name, tensor * 1e30),
            {"dtype": "float16"},
            "a factor does not fit into torch.float16; allowed: --dtype float32 or bfloat16",
        ),
    ],
)
def test_what_is_refused(
    llama: Path, tmp_path: Path, change: Change, fields: dict[str, Any], message: str
) -> None:
    tuned = tune(llama, tmp_path / "tuned", change)
    with pytest.raises(InputError, match=message) as caught:
        extract(config_of(llama, tuned, rank=4, **fields), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_a_missing_tensor(llama: Path, tmp_path: Path) -> None:
    tuned = tune(llama, tmp_path / "tuned", linear_layers)
    tensors = load_file(tuned / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"model.norm.weight: only in {llama}; allowed: in both"):
        extract(config_of(llama, tuned, rank=4), tmp_path / "out")


def test_a_head_of_its_own_over_a_tied_config(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", tied=True)
    tuned = tune(base, tmp_path / "tuned", linear_layers)
    tensors = load_file(tuned / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    extract(config_of(base, tuned, rank=4), tmp_path / "out", strict=True)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head.weight: found other values than model.embed"):
        extract(config_of(base, tuned, rank=4), tmp_path / "other")


def test_models_of_two_kinds(llama: Path, tmp_path: Path) -> None:
    other = save_tiny_gpt2(tmp_path / "gpt2")
    with pytest.raises(InputError, match="architecture: found GPT2LMHeadModel; allowed: Llama"):
        extract(config_of(llama, other, rank=4), tmp_path / "out")
    tied = save_tiny_llama(tmp_path / "tied", tied=True)
    with pytest.raises(InputError, match=r"tied tensors: found \{'lm_head.weight'.*allowed: none"):
        extract(config_of(llama, tied, rank=4), tmp_path / "out")
