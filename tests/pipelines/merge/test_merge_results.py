"""What a merge writes: the values, the files beside them, and that transformers loads them.

Oracle: `merge_tensor` on whole tensors, and transformers, which loads the result.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from operators.merging import METHODS as TABLE
from operators.merging import merge_tensor
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, load_merge_config, merge, plan_merge
from tests.pipelines.merge.conftest import (
    Family,
    make_family,
    save_weights,
    set_config,
    weights_of,
)
from tests.tiny_models import save_tiny_llama

# Every way in which methods are streamed: by elements, by rows, with thresholds, norms or a draw,
# with a number for each row, or as whole tensors; with a base, without, or as it is given.
METHODS: dict[str, dict[str, object]] = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5, "lambda": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "model_stock": {},
    "nuslerp": {"weight": 0.5},
    "multislerp": {},
    "karcher": {"max_iter": 3},
    "nearswap": {"t": 0.01},
    "arcee_fusion": {"tukey_fence": 0.5},
    "sce": {"select_topk": 0.4},
}


def merged(family: Family, out: Path, method: str, **fields: object) -> Path:
    """Merge as many models as the method takes, with the local executor."""
    if "models" not in fields:
        fields["models"] = [{"model": str(path)} for path in taken(family, method)]
    return merge(MergeConfig.model_validate(family.config(method, **fields)), out)


def taken(family: Family, method: str) -> tuple[Path, ...]:
    """The models that a method takes of a family's."""
    return family.models[: TABLE[method].num_models[1]]


@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_what_merge_tensor_gives(
    family: Family, tmp_path: Path, method: str
) -> None:
    out = merged(family, tmp_path / "out", method, parameters=METHODS[method], seed=7)
    base = weights_of(family.base)
    models = [weights_of(path) for path in taken(family, method)]
    result = weights_of(out)
    assert list(result) == list(base)
    for name, values in result.items():
        own_base = None if TABLE[method].needs_base is False else base[name]
        expected = merge_tensor(
            method,
            [model[name] for model in models],
            own_base,
            name=name,
            seed=7,
            **METHODS[method],
        )
        assert values.dtype == torch.float32
        assert torch.equal(values, expected), name


def test_steps_of_any_size_give_the_same_bytes(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method, parameters in METHODS.items():
        whole = weights_of(merged(family, tmp_path / method, method, parameters=parameters))
        with monkeypatch.context() as patch:
            patch.setattr("pipelines.merge.tensor.CHUNK_ELEMENTS", 96)
            patch.setattr("pipelines.merge.plan.PIECE_ELEMENTS", 300)
            out = merged(family, tmp_path / f"{method}-steps", method, parameters=parameters)
        assert all(torch.equal(values, whole[name]) for name, values in weights_of(out).items())


@pytest.mark.parametrize("row_wise", [True, False])
def test_nuslerp_of_rows_and_columns_with_and_without_a_base(
    family: Family, tmp_path: Path, row_wise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that is listed among the models is none of the two."""
    monkeypatch.setattr("pipelines.merge.tensor.CHUNK_ELEMENTS", 96)
    parameters = {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
    base, models = weights_of(family.base), [weights_of(path) for path in family.models[:2]]
    paths = [str(path) for path in (family.base, *family.models[:2])]
    for base_model, listed in ((paths[0], paths), (None, paths[1:])):
        entries = [{"model": path} for path in listed]
        config = {"base_model": base_model, "parameters": parameters}
        out = merged(family, tmp_path / str(len(listed)), "nuslerp", models=entries, **config)
        for name, values in weights_of(out).items():
            own_base = None if base_model is None else base[name]
            own = [model[name] for model in models]
            assert torch.equal(
                values, merge_tensor("nuslerp", own, own_base, name=name, **parameters)
            ), name


def test_thresholds_over_the_whole_model(family: Family, tmp_path: Path) -> None:
    parameters = {"density": 0.2, "scope": "model", "normalize": False}
    config = family.config("ties", parameters=parameters, models=[{"model": str(family.models[0])}])
    result = weights_of(merge(MergeConfig.model_validate(config), tmp_path / "out"))
    base, model = weights_of(family.base), weights_of(family.models[0])
    deltas = {name: (model[name] - base[name]).abs() for name in base}
    every = torch.cat([delta.reshape(-1) for delta in deltas.values()])
    count = int(0.2 * every.numel())
    threshold = every.sort(descending=True).values[count - 1]
    kept = sum(int((result[name] != base[name]).sum()) for name in base)
    assert abs(kept - count) <= 2  # an element can be equal to the base's after rounding
    for name, values in result.items():
        assert (deltas[name][values != base[name]] >= threshold).all()
    gradient = parameters | {"density": [0.1, 0.5]}
    with pytest.raises(InputError, match=r"density: found .* with scope: model; allowed: one"):
        config = family.config("ties", parameters=gradient)
        merge(MergeConfig.model_validate(config), tmp_path / "gradient")


def test_per_model_parameters_and_a_base_among_the_models(family: Family, tmp_path: Path) -> None:
    entries = [{"model": str(family.base)}]
    for weight, model in zip((0.2, 0.3, 0.5), family.models, strict=True):
        entries.append({"model": str(model), "parameters": {"weight": weight}})
    config = family.config("task_arithmetic", models=entries)
    result = weights_of(merge(MergeConfig.model_validate(config), tmp_path / "out"))
    base = weights_of(family.base)
    for name, values in result.items():
        deltas = [weights_of(model)[name] - base[name] for model in family.models]
        expected = base[name] + 0.2 * deltas[0] + 0.3 * deltas[1] + 0.5 * deltas[2]
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_the_result_loads_and_speaks(family: Family, tmp_path: Path) -> None:
    out = merged(family, tmp_path / "out", "linear")
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("a b c", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert tokenizer.chat_template is not None


def test_companions_say_where_the_weights_come_from(family: Family, tmp_path: Path) -> None:
    out = merged(family, tmp_path / "out", "ties", parameters={"density": 0.3})
    provenance = json.loads((out / "poise.json").read_text())
    assert provenance["config"]["merge_method"] == "ties"
    assert set(provenance["inputs"]) == {str(family.base), *map(str, family.models)}
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["tags"] == ["merge", "poise"]
    assert front["base_model"] == [str(family.base), *map(str, family.models)]
    again = tmp_path / "again.yaml"
    again.write_text(card.split("```yaml\n")[1].split("```")[0])
    second = merge(load_merge_config(again), tmp_path / "second")
    assert weights_of(second).keys() == weights_of(out).keys()
    for name, values in weights_of(out).items():
        assert torch.equal(values, weights_of(second)[name])


def test_the_record_has_what_was_drawn(family: Family, tmp_path: Path) -> None:
    models = family.config()["models"][:2]
    parameters = {"mixup_alpha": 2.0}
    out = merged(family, tmp_path / "out", "m3_average", models=models, parameters=parameters)
    [share] = json.loads((out / "poise.json").read_text())["drawn"].values()
    assert f"mixup_lambda = {share:.6f}" in (out / "README.md").read_text()
    one, two = (weights_of(path) for path in family.models[:2])
    for name, values in weights_of(out).items():
        torch.testing.assert_close(values, share * one[name] + (1 - share) * two[name])


def test_bfloat16_is_rounded_once_at_the_end(tmp_path: Path) -> None:
    family = make_family(tmp_path / "inputs", torch.bfloat16)
    out = merged(family, tmp_path / "out", "task_arithmetic", parameters={"lambda": 0.3})
    base, models = weights_of(family.base), [weights_of(path) for path in family.models]
    for name, values in weights_of(out).items():
        deltas = sum(model[name].double() - base[name].double() for model in models)
        exact = base[name].double() + 0.3 * deltas
        assert values.dtype == torch.bfloat16
        # One rounding to 8 bits of mantissa: at most 2^-8, and float32's own.
        assert ((values.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("field", "expected"), [("dtype", "float16"), ("out_dtype", "bfloat16")])
def test_dtype_of_the_output(family: Family, tmp_path: Path, field: str, expected: str) -> None:
    fields = {"dtype": "float16"} | {field: expected}
    out = merged(family, tmp_path / "out", "linear", **fields)
    assert {str(t.dtype) for t in weights_of(out).values()} == {f"torch.{expected}"}
    assert json.loads((out / "config.json").read_text())["dtype"] == expected


def test_sharded_output_has_the_same_values(family: Family, tmp_path: Path) -> None:
    fields = {"parameters": {"density": 0.3}}
    whole = weights_of(merged(family, tmp_path / "whole", "ties", **fields))
    out = merged(family, tmp_path / "shards", "ties", max_shard_bytes=20_000, **fields)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for file in files:
        for name, values in load_file(file).items():
            assert index["weight_map"][name] == file.name
            assert torch.equal(values, whole[name])
    AutoModelForCausalLM.from_pretrained(out)
    # A sharded checkpoint is an input like any other.
    again = MergeConfig.model_validate(family.config(models=[{"model": str(out)}] * 2))
    for name, values in weights_of(merge(again, tmp_path / "again")).items():
        assert torch.equal(values, whole[name])


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    models = [save_tiny_llama(tmp_path / f"m{i}", seed=i, tied=True) for i in range(2)]
    config = {"merge_method": "linear", "models": [{"model": str(path)} for path in models]}
    out = merge(MergeConfig.model_validate(config), tmp_path / "out")
    assert "lm_head.weight" not in weights_of(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_base_with_untied_fine_tune(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", seed=0, tied=True)
    tuned = save_tiny_llama(tmp_path / "tuned", seed=0, tied=True)
    set_config(tuned, tie_word_embeddings=False)
    tensors = weights_of(tuned)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_weights(tuned, tensors)
    config = {
        "merge_method": "task_arithmetic",
        "models": [{"model": str(tuned)}],
        "base_model": str(base),
        "parameters": {"lambda": 0.5},
    }
    out = merge(MergeConfig.model_validate(config), tmp_path / "out")
    embedding = weights_of(base)["model.embed_tokens.weight"]
    assert torch.equal(weights_of(out)["model.embed_tokens.weight"], embedding)
    torch.testing.assert_close(weights_of(out)["lm_head.weight"], embedding + 0.5)
    model = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(model.lm_head.weight.detach(), embedding + 0.5)


def test_integer_buffers_are_copied(own_family: Family, tmp_path: Path) -> None:
    """The base's, as counters differ from model to model."""
    for number, path in enumerate((own_family.base, *own_family.models)):
        set_config(path, architectures=["OwnForCausalLM"])
        save_weights(path, weights_of(path) | {"model.counter": torch.tensor([number])})
    config = MergeConfig.model_validate(own_family.config("task_arithmetic"))
    plan = plan_merge(config)
    assert f"integers are those of {own_family.base}: model.counter" in plan.notices()
    out = merge(config, tmp_path / "out")
    assert weights_of(out)["model.counter"].tolist() == [0]


def test_mixed_dtypes_are_promoted(own_family: Family, tmp_path: Path) -> None:
    model = own_family.models[1]
    save_weights(model, {k: v.to(torch.bfloat16) for k, v in weights_of(model).items()})
    out = merged(own_family, tmp_path / "out", "linear")
    for name, values in weights_of(out).items():
        parts = [weights_of(path)[name].float() for path in own_family.models]
        torch.testing.assert_close(values, sum(parts) / 3)
        assert values.dtype == torch.float32


@pytest.mark.ray
def test_ray_and_local_executors_give_the_same_bytes(
    family: Family, tmp_path: Path, ray_cluster: None, files_of
) -> None:
    config = MergeConfig.model_validate(
        family.config("dare_ties", parameters=METHODS["dare_ties"], seed=3)
    )
    local = merge(config, tmp_path / "local", executor="local")
    ray = merge(config, tmp_path / "ray", executor="ray")
    assert files_of(local) == files_of(ray)


def test_a_tied_base_of_another_architecture_with_an_untied_fine_tune(tmp_path: Path) -> None:
    """GPT-2, whose config does not say that it is tied: the missing head is its embedding."""
    size = {"vocab_size": 40, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    base = GPT2LMHeadModel(GPT2Config(**size))
    base.save_pretrained(tmp_path / "base")
    untied = GPT2LMHeadModel(GPT2Config(**size, tie_word_embeddings=False))
    untied.save_pretrained(tmp_path / "tuned")
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "tuned")}],
        "parameters": {"weight": 0.5},
    }
    out = merge(MergeConfig.model_validate(config), tmp_path / "out")
    merged = GPT2LMHeadModel.from_pretrained(out)
    expected = (base.transformer.wte.weight + untied.lm_head.weight) / 2
    torch.testing.assert_close(merged.lm_head.weight, expected)
    assert not torch.equal(merged.lm_head.weight, merged.transformer.wte.weight)
