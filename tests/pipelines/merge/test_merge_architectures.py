"""Models of many architectures: merged, stacked, compared, made again, and loaded.

Oracles: transformers loads each result without a missing, unexpected or mismatched tensor; values
are computed here in float64.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from pipelines.checkpoints import Checkpoint
from pipelines.merge import MergeConfig, merge
from pipelines.merge.diff import diff_models
from pipelines.merge.verify import verify
from pipelines.merge.vocabulary import num_rows
from tests.hub_models import ARCHITECTURES, save_as_on_hub
from tests.model_kinds import KINDS
from tests.tiny_models import tiny_tokenizer

TABLE = Path(__file__).parents[3] / "docs" / "architectures.md"
# Run by every `make test`; the others are slow.
FAST = {"gpt2", "qwen3_moe", "BertForMaskedLM", "T5ForConditionalGeneration"} | {
    "ResNetForImageClassification",
    "Gemma3ForConditionalGeneration",
}
EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"}
CAUSAL = {
    name: "mixture of experts" if name in EXPERTS else "state space" if name == "mamba" else kind
    for kind, names in {"decoder": ARCHITECTURES}.items()
    for name in names
}
OTHERS = {name: kind for kind, classes in KINDS.items() for name in classes}
WITHOUT_TOKENS = {"HubertModel", *KINDS["vision"]}
ALL = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in (*CAUSAL, *OTHERS)
]


def save(name: str, path: Path, seed: int, num_added: int = 0) -> Path:
    """A random model in the layout of the hub, with a tokenizer where it has one."""
    if name in CAUSAL:
        size = len(tiny_tokenizer())
        save_as_on_hub(name, path, seed, vocab_size=size + num_added)
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.add_tokens([f"of{seed}-{row}" for row in range(num_added)])
        tokenizer.save(str(path / "tokenizer.json"))
        return path
    model_type, fields = KINDS[OTHERS[name]][name]
    config = AutoConfig.for_model(model_type, **fields)
    text = config.get_text_config()
    if num_added and hasattr(text, "vocab_size"):
        text.vocab_size += num_added
        config.vocab_size = text.vocab_size
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, name)(config)
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for key, values in tensors.items():  # zeros and ones of the start would hide mistakes
        noise = 0.05 * torch.randn(values.shape)
        tensors[key] = values + noise if values.is_floating_point() else values + seed
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if size := getattr(text, "vocab_size", None):
        words = {f"w{row}": row for row in range(size - num_added)}
        words |= {f"of{seed}-{row}": row for row in range(size - num_added, size)}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(path / "tokenizer.json"))
    return path


def merged(out: Path, method: str, paths: list[Path], **fields: Any) -> dict[str, Tensor]:
    config = {"merge_method": method, "models": [{"model": str(path)} for path in paths]}
    merge(MergeConfig.model_validate(config | fields), out, executor="local")
    return load_file(out / "model.safetensors")


def assert_loads(path: Path) -> PreTrainedModel:
    architecture = getattr(transformers, Checkpoint.open(path).config["architectures"][0])
    model, info = architecture.from_pretrained(path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model


def assert_values(
    found: dict[str, Tensor], inputs: list[dict[str, Tensor]], expected: Callable[..., Tensor]
) -> None:
    """Each floating tensor is as computed from the inputs in float64; others are the first's."""
    assert found.keys() == inputs[0].keys()
    for name, values in found.items():
        own = [each[name] for each in inputs]
        if values.is_floating_point():
            wanted = expected(*(each.double() for each in own)).to(values.dtype)
            torch.testing.assert_close(values, wanted, atol=1e-6, rtol=1e-5, msg=name)
        else:
            assert torch.equal(values, own[0]), name


def mean(one: Tensor, two: Tensor) -> Tensor:
    return 0.3 * one + 0.7 * two


def slerp(one: Tensor, two: Tensor) -> Tensor:
    cosine = (one * two).sum() / (one.norm() * two.norm())
    if cosine.abs() > 0.9995 or one.norm() < 1e-8 or two.norm() < 1e-8:
        return 0.7 * one + 0.3 * two
    angle = cosine.clamp(-1, 1).arccos()
    return ((0.7 * angle).sin() * one + (0.3 * angle).sin() * two) / angle.sin()


def ties(base: Tensor, one: Tensor, two: Tensor) -> Tensor:
    kept = []
    for model in (one, two):
        delta = (model.float() - base.float()).double()
        count = max(1, int(0.5 * delta.numel()))
        least = delta.abs().flatten().sort(descending=True).values[count - 1]
        kept.append(torch.where(delta.abs() >= least, delta, 0))
    stacked = torch.stack(kept)
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return base + (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@pytest.mark.parametrize("name", ALL)
def test_merges_of_an_architecture(name: str, tmp_path: Path) -> None:
    base, one, two = (save(name, tmp_path / str(seed), seed) for seed in range(3))
    tensors = [load_file(path / "model.safetensors") for path in (base, one, two)]
    weights = [{"model": str(one), "parameters": {"weight": 0.3}}]
    weights += [{"model": str(two), "parameters": {"weight": 0.7}}]
    found = merged(tmp_path / "linear", "linear", [], models=weights)
    assert_values(found, tensors[1:], mean)
    base_of = {"base_model": str(one), "parameters": {"t": 0.3}}
    assert_values(merged(tmp_path / "slerp", "slerp", [one, two], **base_of), tensors[1:], slerp)
    base_of = {"base_model": str(base), "parameters": {"density": 0.5}}
    assert_values(merged(tmp_path / "ties", "ties", [one, two], **base_of), tensors, ties)
    for method in ("linear", "slerp", "ties"):
        assert_loads(tmp_path / method)
    assert verify(tmp_path / "ties", again=True).again is True
    differences = diff_models(str(one), str(tmp_path / "linear"))
    exact = sum(
        (0.7 * (one.double() - two.double())).square().sum().item()
        for one, two in zip(tensors[1].values(), tensors[2].values(), strict=True)
        if one.is_floating_point()
    )
    assert differences[-1].delta == pytest.approx(exact**0.5, rel=1e-4)


@pytest.mark.parametrize("name", [each for each in ALL if each.values[0] not in WITHOUT_TOKENS])
def test_the_union_of_two_vocabularies(name: str, tmp_path: Path) -> None:
    paths = [save(name, tmp_path / str(seed), seed, num_added=seed + 1) for seed in range(2)]
    size = num_rows(Checkpoint.open(paths[0])) - 1
    out = tmp_path / "out"
    merged(out, "linear", paths, tokenizer="union")
    assert num_rows(Checkpoint.open(out)) == size + 1 + 2
    assert_loads(out)


@pytest.mark.parametrize("name", [each for each in ALL if each.values[0] in CAUSAL])
def test_stacks_of_decoders(name: str, tmp_path: Path) -> None:
    """Three layers of two: the last one twice, which transformers loads and runs."""
    paths = [save(name, tmp_path / str(seed), seed) for seed in range(2)]
    slices = [
        {"sources": [{"model": str(path), "layer_range": layers}]}
        for path, layers in zip(paths, ([0, 2], [1, 2]), strict=True)
    ]
    config = {"merge_method": "passthrough", "slices": slices}
    out = merge(MergeConfig.model_validate(config), tmp_path / "out", executor="local")
    model = assert_loads(out)
    assert model.config.num_hidden_layers == 3
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_table_in_the_docs_names_what_is_tested() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", TABLE.read_text(), re.MULTILINE)
    assert dict(rows) == {**CAUSAL, **OTHERS} and len(rows) >= 36
