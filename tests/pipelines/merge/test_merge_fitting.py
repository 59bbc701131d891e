"""What is written is what its config builds: names, shapes, ties, rows by token, infinities.

The oracle is transformers itself: it loads each result without a missing, unexpected or mismatched
tensor, and values are means in float64.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge, plan_merge
from pipelines.merge.diff import diff_models
from tests.hub_models import save_as_on_hub
from tests.pipelines.merge.conftest import save_weights, set_config, weights_of

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 12,
}
T5 = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=12)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=12, n_positions=8)


def save(folder: Path, make: type[PreTrainedModel], config: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    make(config).save_pretrained(folder)
    return folder


def pair(folder: Path, make: type[PreTrainedModel], config: Any) -> list[Path]:
    return [save(folder / name, make, config, seed) for seed, name in enumerate("ab")]


def config_of(paths: list[Path], method: str = "linear", **fields: object) -> MergeConfig:
    if method != "linear":
        fields["base_model"] = str(paths[0])
    return MergeConfig.model_validate(
        {"merge_method": method, "models": [{"model": str(path)} for path in paths], **fields}
    )


def assert_loads(path: Path, make: type[PreTrainedModel]) -> PreTrainedModel:
    model, info = make.from_pretrained(path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model


def refused(config: MergeConfig, out: Path) -> str:
    with pytest.raises(InputError) as error:
        merge(config, out)
    assert not out.exists()
    return str(error.value)


def test_a_missing_tensor(tmp_path: Path) -> None:
    paths = pair(tmp_path, LlamaForCausalLM, LlamaConfig(**SIZES))
    for path in paths:
        tensors = weights_of(path)
        del tensors["model.norm.weight"]
        save_weights(path, tensors)
    assert refused(config_of(paths), tmp_path / "out") == (
        f"{paths[0] / 'config.json'}: architectures: found LlamaForCausalLM, which needs "
        "model.norm.weight; the models do not have it"
    )


def test_a_tensor_of_another_shape(tmp_path: Path) -> None:
    paths = pair(tmp_path, LlamaForCausalLM, LlamaConfig(**SIZES))
    for path in paths:
        set_config(path, intermediate_size=24)
    message = refused(config_of(paths), tmp_path / "out")
    assert message.startswith(
        f"{paths[0] / 'config.json'}: architectures: found LlamaForCausalLM, whose "
        "model.layers.0.mlp.down_proj.weight has shape [16, 24] with this config; the result would "
    )


def test_a_tensor_that_the_class_does_not_have(tmp_path: Path) -> None:
    paths = pair(tmp_path, LlamaForCausalLM, LlamaConfig(**SIZES))
    for path in paths:
        save_weights(path, weights_of(path) | {"score.weight": torch.ones(1, 16)})
    assert refused(config_of(paths), tmp_path / "out").endswith(
        "found LlamaForCausalLM, which has no tensor score.weight"
    )


def test_a_layer_more_than_the_config_says(tmp_path: Path) -> None:
    paths = pair(tmp_path, LlamaForCausalLM, LlamaConfig(**SIZES))
    for path in paths:
        set_config(path, num_hidden_layers=1)
    message = refused(config_of(paths), tmp_path / "out")
    assert "which has no tensor model.layers.1." in message


def test_a_config_that_builds_nothing(tmp_path: Path) -> None:
    paths = pair(tmp_path, LlamaForCausalLM, LlamaConfig(**SIZES))
    set_config(paths[0], hidden_act="golu")
    assert refused(config_of(paths), tmp_path / "out").startswith(
        f"{paths[0]}: config.json: cannot build a LlamaForCausalLM: "
    )


def test_what_is_not_stored_any_more_is_carried_over(tmp_path: Path) -> None:
    """Rotary frequencies of old Llamas, which transformers ignores."""
    paths = pair(tmp_path, LlamaForCausalLM, LlamaConfig(**SIZES))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for path in paths:
        save_weights(path, weights_of(path) | {name: torch.arange(4.0)})
    config = config_of(paths)
    expected = f"carried over, though a LlamaForCausalLM does not use it: {name}"
    assert expected in plan_merge(config).notices()
    out = merge(config, tmp_path / "out")
    assert torch.equal(weights_of(out)[name], torch.arange(4.0))
    assert_loads(out, LlamaForCausalLM)


def test_experts_one_by_one_and_layers_under_other_names(tmp_path: Path) -> None:
    """Mixtral's experts as they lie on the hub; GPT-2 without its prefix, with its masks, which are
    infinite in some files.
    """
    moe = pair(
        tmp_path / "moe",
        MixtralForCausalLM,
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3),
    )
    out = merge(config_of(moe), tmp_path / "moe" / "out")
    found, (one, two) = weights_of(out), map(weights_of, moe)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    torch.testing.assert_close(found[name].double(), (one[name].double() + two[name].double()) / 2)
    assert_loads(out, MixtralForCausalLM)

    hub = pair(tmp_path / "hub", GPT2LMHeadModel, GPT2)
    mask = torch.full((8, 8), float("-inf")).triu(1)
    for path in hub:
        tensors = {k.removeprefix("transformer."): v for k, v in weights_of(path).items()}
        masks = {f"h.{layer}.attn.bias": mask[None, None].clone() for layer in range(2)}
        save_weights(path, tensors | masks)
    out = merge(config_of(hub, "ties", parameters={"density": 0.5}), tmp_path / "hub" / "out")
    assert torch.equal(weights_of(out)["h.1.attn.bias"], mask[None, None])
    assert "wte.weight" in weights_of(out)
    assert_loads(out, GPT2LMHeadModel)


def test_infinities_that_only_one_model_has(tmp_path: Path) -> None:
    paths = pair(tmp_path, GPT2LMHeadModel, GPT2)
    for path, value in zip(paths, (float("-inf"), -1e4), strict=True):
        mask = torch.zeros(1, 1, 8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), value)
        save_weights(path, weights_of(path) | {"transformer.h.0.attn.bias": mask})
    assert "transformer.h.0.attn.bias: holds NaN or Inf" in refused(
        config_of(paths), tmp_path / "out"
    )


@pytest.mark.parametrize("method", ["linear", "dare_linear"])
def test_copies_of_one_embedding_stay_one(tmp_path: Path, method: str) -> None:
    """T5's old files have its embedding three times; random choices must not make them three."""
    paths = pair(tmp_path, T5ForConditionalGeneration, T5)
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    for path in paths:
        tensors = weights_of(path)
        save_weights(path, tensors | {name: tensors["shared.weight"].clone() for name in names})
    fields: dict[str, object] = {"parameters": {"density": 0.5}} if method != "linear" else {}
    out = merge(config_of(paths, method, **fields), tmp_path / "out")
    found = weights_of(out)
    assert all(torch.equal(found[name], found["shared.weight"]) for name in names)
    assert_loads(out, T5ForConditionalGeneration)


def test_copies_that_differ(tmp_path: Path) -> None:
    """A head with values of its own under a config that ties it: the result's config does not; two
    embeddings of T5, of which one is used: refused.
    """
    paths = pair(tmp_path / "llama", LlamaForCausalLM, LlamaConfig(**SIZES))
    for path in paths:
        set_config(path, tie_word_embeddings=True)
    out = merge(config_of(paths), tmp_path / "llama" / "out")
    assert AutoConfig.from_pretrained(out).tie_word_embeddings is False
    heads = [weights_of(path)["lm_head.weight"] for path in paths]
    head = assert_loads(out, LlamaForCausalLM).lm_head.weight
    torch.testing.assert_close(head.detach(), sum(heads) / 2)

    paths = pair(tmp_path / "t5", T5ForConditionalGeneration, T5)
    other = "encoder.embed_tokens.weight"
    for path in paths:
        save_weights(path, weights_of(path) | {other: torch.ones(12, 16)})
    assert refused(config_of(paths), tmp_path / "t5" / "out") == (
        f"{paths[0] / 'model.safetensors'}: {other} and shared.weight differ, but the model's "
        "class makes them one; allowed: equal values"
    )


def save_tokens(folder: Path, tokens: list[str]) -> None:
    vocabulary = {token: row for row, token in enumerate(tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(
        str(folder / "tokenizer.json")
    )


def test_rows_of_every_tensor_that_has_one_for_each_token(tmp_path: Path) -> None:
    """BERT's embedding and the bias of its head, found by growing the vocabulary."""
    common = ["<unk>", "a", "b", "c"]
    paths = []
    for name, extra in (("one", ["d"]), ("two", ["e", "f"])):
        tokens = [*common, *extra]
        config = BertConfig(**SIZES | {"vocab_size": len(tokens)}, max_position_embeddings=8)
        paths.append(save(tmp_path / name, BertForMaskedLM, config, len(tokens)))
        save_tokens(paths[-1], tokens)
        tensors = load_file(paths[-1] / "model.safetensors")
        tensors["cls.predictions.bias"] = torch.arange(float(len(tokens)))
        save_file(tensors, paths[-1] / "model.safetensors", {"format": "pt"})
    out = merge(config_of(paths, tokenizer="union"), tmp_path / "out")
    found, (one, two) = weights_of(out), map(weights_of, paths)
    # d is row 4 of the first; e and f are rows 4 and 5 of the second: rows 5 and 6 of the union.
    assert found["cls.predictions.bias"].tolist() == [0, 1, 2, 3, 4, 4, 5]
    name = "bert.embeddings.word_embeddings.weight"
    rows = [*((one[name][:4] + two[name][:4]) / 2), one[name][4], two[name][4], two[name][5]]
    torch.testing.assert_close(found[name], torch.stack(rows))
    assert AutoConfig.from_pretrained(out).vocab_size == 7
    assert_loads(out, BertForMaskedLM)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt2", "gpt_neox", "bloom"])
@pytest.mark.parametrize("fused_first", [False, True])
def test_one_model_in_two_layouts(name: str, fused_first: bool, tmp_path: Path) -> None:
    """As on the hub and as the model has them (experts fused, names with prefixes): the result is
    that of equal layouts, in the layout of the first.
    """
    hub = [save_as_on_hub(name, tmp_path / f"hub-{seed}", seed) for seed in range(2)]
    fused = [save_as_on_hub(name, tmp_path / f"fused-{s}", s, fused=True) for s in range(2)]
    one, two = (fused, hub) if fused_first else (hub, fused)
    found = weights_of(merge(config_of([one[0], two[1]]), tmp_path / "mixed"))
    expected = weights_of(merge(config_of(one), tmp_path / "same"))
    assert diff_models(str(one[0]), str(two[0]))[-1].delta == 0
    assert expected.keys() <= found.keys()  # masks are carried over where only one has them
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=0, atol=0, msg=key)


def test_a_base_model_beside_one_with_a_head(tmp_path: Path) -> None:
    """BertModel beside BertForMaskedLM: the common part merges, the head is the one's own."""
    config = BertConfig(**SIZES)
    masked = save(tmp_path / "masked", BertForMaskedLM, config, 0)
    plain = save(tmp_path / "plain", BertModel, config, 1)
    both = config_of([masked, plain])
    assert "has no tensor 'cls.predictions" in refused(both, tmp_path / "out")
    name = "encoder.layer.1.output.dense.weight"
    mean = (weights_of(masked)[f"bert.{name}"] + weights_of(plain)[name]) / 2
    both = config_of([masked, plain], allow_missing=["cls.*", "pooler.*"])
    assert any(
        "left out" in line and "cls.predictions" in line for line in plan_merge(both).notices()
    )
    found = assert_loads(merge(both, tmp_path / "plain-out"), BertModel).state_dict()
    torch.testing.assert_close(found[name], mean)

    tensors = weights_of(plain)
    save_weights(plain, {k: v for k, v in tensors.items() if not k.startswith("pooler")})
    out = merge(config_of([masked, plain], allow_missing=["cls.*"]), tmp_path / "out")
    found = weights_of(out)
    torch.testing.assert_close(found[f"bert.{name}"], mean)
    assert torch.equal(found["cls.predictions.bias"], weights_of(masked)["cls.predictions.bias"])
    assert_loads(out, BertForMaskedLM)
