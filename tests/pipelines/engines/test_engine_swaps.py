"""Other weights put into a running engine on transformers.

Oracles: engines that are freshly started, and merges that are written.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.engines import EngineConfig, Sampling, inspect, open_engine, weights_of
from pipelines.errors import InputError
from pipelines.merge import load_merge_config, merge, plan_merge
from tests.pipelines.checkpoints.digest_definition import weights_digest
from tests.pipelines.engines.references import damage, long_prompts, save_chatty
from tests.tiny_models import save_tiny_gpt2

CHATS = [[{"role": "user", "content": " ".join("abcdefghij"[:n])}] for n in range(1, 9)]


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("tied", "tied"), ("gpt2", "gpt2")])
def test_after_a_swap_an_engine_is_as_one_freshly_started(
    models: dict[str, Path], tmp_path: Path, first: str, second: str
) -> None:
    engine = open_engine(models[first])
    other = models[second]
    if first == second:
        make = {"tied": lambda: save_chatty(tmp_path / "o", 9, tied=True)}
        other = make.get(first, lambda: save_tiny_gpt2(tmp_path / "o", 9))()
    prompts = long_prompts(150 if first != "gpt2" else 50)
    before = engine.generate(prompts, Sampling(max_tokens=8))
    assert engine.swap(other) == weights_digest(other)
    after = engine.generate(prompts, Sampling(max_tokens=8))
    assert after == open_engine(other).generate(prompts, Sampling(max_tokens=8))
    assert [each.tokens for each in after] != [each.tokens for each in before]
    assert engine.swap(models[first]) == before[0].weights
    assert engine.generate(prompts, Sampling(max_tokens=8)) == before


MERGES = {
    "linear": "merge_method: linear",
    "ties": "merge_method: ties\nbase_model: {b}\nparameters: {{density: 0.5}}",
    "model_ties": "merge_method: ties\nbase_model: {b}\nparameters: {{density: 0.5, scope: model}}",
    "dare_ties": "merge_method: dare_ties\nbase_model: {b}\nseed: 4\nparameters: {{density: 0.5}}",
    "tsvm": "merge_method: tsvm\nbase_model: {b}",
    "rounded": "merge_method: linear\nout_dtype: bfloat16",
}


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_in_memory_is_the_merge_that_is_written(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    file = tmp_path / "merge.yaml"
    third = save_chatty(tmp_path / "c", 8)
    weight = "" if name == "tsvm" else ", parameters: {{weight: {}}}"
    file.write_text(
        MERGES[name].format(b=models["b"])
        + f"\nmodels:\n- {{model: {models['a']}{weight.format(0.3)}}}\n"
        f"- {{model: {third}{weight.format(0.7)}}}\n"
    )
    config = load_merge_config(file)
    written = merge(config, tmp_path / "out")
    engine = open_engine(models["a"], EngineConfig(dtype="float32"))
    digest = engine.swap(plan_merge(config))
    assert digest == weights_digest(written)
    assert digest == json.loads((written / "poise.json").read_text())["weights"]
    fresh = open_engine(written, EngineConfig(dtype="float32"))
    prompts = long_prompts(140)
    sampling = Sampling(max_tokens=6)
    assert engine.generate(prompts, sampling) == fresh.generate(prompts, sampling)


def test_what_does_not_fit_changes_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    engine = open_engine(models["a"])
    before = engine.generate(CHATS, Sampling(max_tokens=5))
    other = shutil.copytree(models["b"], tmp_path / "theta")
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 0.5  # the same shapes, other answers
    (other / "config.json").write_text(json.dumps(config))
    for source, message in (
        (save_chatty(tmp_path / "wide", 1, intermediate_size=128), r"found shape \[64, 128\]"),
        (models["tied"], "lm_head.weight is in the engine's model and not in it"),
        (save_chatty(tmp_path / "deep", 1, num_hidden_layers=3), "layers.2.* is in it and not in"),
        (save_chatty(tmp_path / "half", 1, dtype=torch.bfloat16), "found torch.bfloat16; allowed"),
        (other, "rms_norm_eps: found 0.5"),
        (tmp_path / "nothing", "no such directory"),
    ):
        with pytest.raises(InputError, match=message):
            engine.swap(source)
        assert engine.generate(CHATS, Sampling(max_tokens=5)) == before


def test_a_failed_swap_refuses_to_answer_until_one_succeeds(
    models: dict[str, Path], tmp_path: Path
) -> None:
    engine = open_engine(models["a"])
    bad = damage(save_chatty(tmp_path / "bad", 2), "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match=r"bad: model\.layers\.1\.mlp.*NaN or Inf"):
        engine.swap(bad)
    for ask in (
        lambda: engine.generate(CHATS, Sampling()),
        lambda: engine.log_likelihoods(["a"], ["b"]),
        lambda: engine.weights,
    ):
        with pytest.raises(InputError, match="does not answer, as a swap failed"):
            ask()
    engine.swap(models["b"])
    fresh = open_engine(models["b"])
    assert engine.generate(CHATS, Sampling(max_tokens=5)) == fresh.generate(
        CHATS, Sampling(max_tokens=5)
    )
    with pytest.raises(InputError, match="holds NaN or Inf"):
        inspect(weights_of(bad))
    with pytest.raises(InputError, match="holds NaN or Inf"):
        open_engine(bad)


@pytest.mark.parametrize(
    ("values", "is_refused"),
    [
        ([0.0, -torch.inf, 0.0], False),  # a mask
        ([1.0, -torch.inf, 0.0], True),
        ([0.0, torch.inf, 0.0], True),
        ([0.0, torch.nan, -torch.inf], True),
    ],
)
def test_infinities_are_for_masks(tmp_path: Path, values: list[float], is_refused: bool) -> None:
    save_file({"mask": torch.tensor(values)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    if is_refused:
        with pytest.raises(InputError, match="mask: holds NaN or Inf"):
            inspect(weights_of(tmp_path))
    else:
        assert inspect(weights_of(tmp_path)) == weights_digest(tmp_path)


def test_another_chat_template_comes_with_a_swap(models: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(models["b"], tmp_path / "other")
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text("<unk>" + template)
    engine = open_engine(models["a"])
    before = engine.encode(CHATS[0])
    engine.swap(other)
    assert engine.encode(CHATS[0]) == [3, *before]
    tokens = json.loads((other / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["a"], tokens["model"]["vocab"]["b"] = 7, 6
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(InputError, match="its tokenizer has other tokens"):
        engine.swap(other)
