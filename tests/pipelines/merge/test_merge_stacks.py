"""Models with several stacks of layers: vision-language models, and encoders with decoders.

Oracle: weights by hand for each layer, and transformers, which loads the result without a word.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge
from pipelines.merge.layers import Stacks
from tests.tiny_models import tiny_tokenizer

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def qwen2_vl(vocabulary: int) -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 5, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=TEXT | {"vocab_size": vocabulary, "rope_parameters": rope},
        vision_config=vision | {"patch_size": 14, "spatial_merge_size": 2},
        image_token_id=4, video_token_id=5, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config)


def gemma3(vocabulary: int) -> PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = Gemma3Config(
        text_config=TEXT | {"vocab_size": vocabulary, "head_dim": 8, "sliding_window": 16},
        vision_config=vision | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1, image_token_index=4, boi_token_index=5, eoi_token_index=6,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def t5(vocabulary: int) -> PreTrainedModel:
    config = T5Config(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3,
        num_heads=4,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def save_two(make: Callable[[int], PreTrainedModel], folder: Path, *, more: int = 0) -> list[str]:
    """Two models; the second one's tokenizer has `more` tokens."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([f"new{i}" for i in range(more * seed)])
        make(len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return [str(folder / "a"), str(folder / "b")]


def merged(folder: Path, **values: Any) -> Path:
    return merge(MergeConfig.model_validate(values), folder / "out", executor="local")


def assert_loads(path: Path) -> PreTrainedModel:
    model, info = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model


def share_of(name: str, a: dict[str, Any], b: dict[str, Any], out: dict[str, Any]) -> float:
    """How far a tensor has gone from a to b."""
    whole, part = (b[name] - a[name]).flatten(), (out[name] - a[name]).flatten()
    return float(part @ whole / (whole @ whole))


def test_a_gradient_runs_over_each_stack_by_itself(tmp_path: Path) -> None:
    a, b = save_two(qwen2_vl, tmp_path)
    models = [{"model": b, "parameters": {"weight": [0, 1]}}]
    out = merged(tmp_path, merge_method="task_arithmetic", base_model=a, models=models)
    files = [load_file(Path(p) / "model.safetensors") for p in (a, b, out)]
    shares = {}
    for name in files[0]:
        if name.endswith(
            ("mlp.up_proj.weight", "attn.proj.weight", "mlp.0.weight", "mlp.2.weight")
        ):
            shares[name] = round(share_of(name, *files), 3)
    assert shares == {
        **{f"model.layers.{i}.mlp.up_proj.weight": t for i, t in enumerate([0.0, 0.5, 1.0])},
        **{f"visual.blocks.{i}.attn.proj.weight": i / 4 for i in range(5)},
        "visual.merger.mlp.0.weight": 0.0,
        "visual.merger.mlp.2.weight": 0.0,
    }


@pytest.mark.parametrize("make", [gemma3, qwen2_vl])
def test_vocabularies_are_set_where_they_belong(make: Callable, tmp_path: Path) -> None:
    a, b = save_two(make, tmp_path, more=2)
    models = [{"model": path, "parameters": {"weight": 0.5}} for path in (a, b)]
    out = merged(tmp_path, merge_method="linear", models=models, tokenizer="union")
    model = assert_loads(out)
    rows = len(tiny_tokenizer()) + 2
    assert model.config.text_config.vocab_size == rows
    assert model.get_input_embeddings().weight.shape[0] == rows


@pytest.mark.parametrize("make", [gemma3, qwen2_vl])
def test_slices_act_on_the_language_model_alone(make: Callable, tmp_path: Path) -> None:
    a, b = save_two(make, tmp_path)
    slices = [
        {"sources": [{"model": a, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [1, 3]}]},
    ]
    out = merged(tmp_path, merge_method="passthrough", slices=slices)
    model = assert_loads(out)
    assert model.config.text_config.num_hidden_layers == 4
    first, second, found = (load_file(Path(p) / "model.safetensors") for p in (a, b, out))
    stacks = Stacks.of(first)
    for name, values in found.items():
        place = stacks.layer_of(name)
        if place is None or place[0] != stacks.text:
            continue
        source, layer = (first, place[1]) if place[1] < 2 else (second, place[1] - 1)
        old = name.replace(f"{stacks.text}{place[1]}.", f"{stacks.text}{layer}.", 1)
        assert torch.equal(values, source[old]), name
    beside = [n for n in found if (p := stacks.layer_of(n)) and p[0] != stacks.text]
    assert beside
    assert all(torch.equal(found[name], first[name]) for name in beside)


def test_an_encoder_and_a_decoder_cannot_be_sliced(tmp_path: Path) -> None:
    a, _ = save_two(t5, tmp_path)
    slices = [{"sources": [{"model": a, "layer_range": [0, 1]}]}]
    message = (
        r"found several stacks of layers \((decoder.block.N, encoder|encoder.block.N, decoder)"
    )
    with pytest.raises(InputError, match=message):
        merged(tmp_path, merge_method="passthrough", slices=slices)


@pytest.mark.parametrize("settings", [{}, {"allow_missing": ["*.embed_tokens.weight"]}])
def test_an_embedding_stored_under_several_names_is_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """T5's files of old have it three times, those of today once."""
    a, b = save_two(t5, tmp_path)
    file = Path(a) / "model.safetensors"
    tensors = load_file(file)
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    save_file(tensors | {name: tensors[names[0]].clone() for name in names}, file, {"format": "pt"})
    models = [{"model": b, "parameters": {"weight": 0.5}}]
    out = merged(tmp_path, merge_method="task_arithmetic", base_model=a, models=models, **settings)
    found = load_file(out / "model.safetensors")
    other = load_file(Path(b) / "model.safetensors")[names[0]]
    expected = tensors[names[0]] + 0.5 * (other - tensors[names[0]])
    for name in names:
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-6)
