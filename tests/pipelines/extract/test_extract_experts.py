"""Extracted adapters of experts, routers and biases. Oracle: PEFT, which loads and merges them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipelines.checkpoints import open_model
from pipelines.extract import ExtractConfig, extract
from pipelines.merge import MergeConfig, merge
from pipelines.merge.verify import verify
from tests.hub_models import ARCHITECTURES, random_model
from tests.model_kinds import KINDS


def model_of(name: str) -> PreTrainedModel:
    if name in ARCHITECTURES:
        return random_model(name)
    [(kind, fields)] = [each[name] for each in KINDS.values() if name in each]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, name)(AutoConfig.for_model(kind, **fields))
    return model


def save_pair(name: str, folder: Path, *, fused: bool, rank: int = 2) -> tuple[Path, Path]:
    """A model, and the same with a change of low rank in each matrix of its blocks but
    convolutions and recurrences, expert by expert, and with other biases.
    """
    model = model_of(name)
    model.save_pretrained(folder / "base", save_original_format=not fused)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("bias"):
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
            elif (
                (".layers." in key or ".h." in key)
                and tensor.dim() > 1
                and not key.endswith(("conv1d.weight", "_log"))
            ):
                left, right = tensor.shape[:-1], (*tensor.shape[:-2], rank, tensor.shape[-1])
                change = torch.randn(*left, rank, generator=generator)
                tensor.add_(0.02 * change @ torch.randn(right, generator=generator))
    model.save_pretrained(folder / "tuned", save_original_format=True)
    return folder / "base", folder / "tuned"


def extracted(base: Path, tuned: Path | str, out: Path, **fields: Any) -> Path:
    config = ExtractConfig.model_validate({"base": str(base), "tuned": str(tuned), **fields})
    return extract(config, out, strict=True)


def state_of(path: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("mixtral", False),
        ("GptOssForCausalLM", False),
        ("gpt_neox", False),
        *(
            pytest.param(name, fused, marks=pytest.mark.slow)
            for name, fused in {
                "mixtral": True,
                "qwen2_moe": False,
                "qwen3_moe": True,
                "olmoe": False,
                "deepseek_v2": False,
                "deepseek_v3": False,
                "JambaForCausalLM": False,
                "opt": False,
                "bloom": False,
            }.items()
        ),
    ],
)
def test_peft_makes_the_tuned_model(name: str, fused: bool, tmp_path: Path) -> None:
    base, tuned = save_pair(name, tmp_path, fused=fused)
    out = extracted(base, tuned, tmp_path / "out", rank=2, dtype="float32")
    assert json.loads((out / "poise.json").read_text())["left_out"] == {}
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(model, out)
    expected = state_of(tuned)
    for key, values in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(values, expected[key], atol=1e-6, rtol=1e-6, msg=key)
    values = {"merge_method": "passthrough", "models": [{"model": f"{base}+{out}"}]}
    made = merge(MergeConfig.model_validate(values), tmp_path / "made", executor="local")
    for key, values in state_of(made).items():
        torch.testing.assert_close(values, expected[key], atol=1e-6, rtol=1e-6, msg=key)


@pytest.mark.filterwarnings("ignore")
def test_ranks_of_experts_and_a_second_extraction(tmp_path: Path) -> None:
    """The largest rank that an expert needs; the adapter itself is compressed; and made again."""
    base, tuned = save_pair("mixtral", tmp_path, fused=False, rank=3)
    out = extracted(base, tuned, tmp_path / "out", energy=0.9, dtype="float32")
    assert verify(out, again=True).again is True
    before, after, record = (
        state_of(base),
        state_of(tuned),
        json.loads((out / "poise.json").read_text()),
    )
    for name, found in record["modules"].items():
        key = name if "experts" in name or name.endswith(".weight") else f"{name}.weight"
        delta = (after[key] - before[key]).double()
        squares = torch.linalg.svdvals(delta.view(-1, *delta.shape[-2:])).square()
        shares = squares.cumsum(-1) / squares.sum(-1, keepdim=True)
        assert found["rank"] == int((shares < 0.9).sum(-1).max()) + 1
        assert found["delta"] == pytest.approx(float(delta.norm()))
    again = extracted(base, out, tmp_path / "again", energy=0.999999, dtype="float32")
    one, two = (open_model(f"{base}+{path}") for path in (out, again))
    for name in one.names():
        spec = one.find(name)
        assert spec is not None
        values = (each.read(name, 0, spec.num_elements).float() for each in (one, two))
        torch.testing.assert_close(*values, atol=1e-4, rtol=1e-3, msg=name)
