"""mergekit's YAML: gradients, filters, slices and fields that change nothing here.

Oracle: the models' own tensors, values worked out by hand, and the same merge without the field.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines.errors import InputError
from pipelines.merge import MergeConfig, load_merge_config, merge, plan_merge
from tests.pipelines.merge.conftest import Family, weights_of


def load(folder: Path, text: str) -> MergeConfig:
    file = folder / "merge.yaml"
    file.write_text(text)
    return load_merge_config(file)


def test_a_file_with_everything(family: Family, tmp_path: Path) -> None:
    config = load(
        tmp_path,
        f"""
models:
  - model: {family.base}
    # no parameters necessary for the base
  - model: {family.models[0]}
    parameters:
      weight: [0, 1]
  - model: {family.models[1]}
    parameters:
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: task_arithmetic
base_model: {family.base}
parameters:
  normalize: false
  int8_mask: true
dtype: float32
""",
    )
    assert config.notices() == ["int8_mask: has no effect: masks are never stored"]
    result = weights_of(merge(config, tmp_path / "out"))
    base = weights_of(family.base)
    one, two = (weights_of(path) for path in family.models[:2])
    for name, values in result.items():
        first = 1.0 if "layers.1" in name or name in ("model.norm.weight", "lm_head.weight") else 0
        second = 0.5 if "mlp" in name else 0.0
        expected = base[name] + first * (one[name] - base[name])
        expected = expected + second * (two[name] - base[name])
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


def test_slices_merge_layer_by_layer(family: Family, tmp_path: Path) -> None:
    a, b = family.models[:2]
    config = load(
        tmp_path,
        f"""
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 2]}}
      - {{model: {b}, layer_range: [0, 2], parameters: {{weight: 3}}}}
  - sources:
      - {{model: {a}, layer_range: [1, 2]}}
      - {{model: {b}, layer_range: [0, 1]}}
    parameters: {{weight: 2}}
merge_method: linear
parameters: {{weight: 1}}
""",
    )
    out = merge(config, tmp_path / "out")
    one, two, result = weights_of(a), weights_of(b), weights_of(out)
    layer = "model.layers.{}.mlp.up_proj.weight".format
    for number in (0, 1):
        expected = one[layer(number)] / 4 + two[layer(number)] * 3 / 4
        torch.testing.assert_close(result[layer(number)], expected)
    torch.testing.assert_close(result[layer(2)], (one[layer(1)] + two[layer(0)]) / 2)
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    torch.testing.assert_close(result[embedding], one[embedding] / 4 + two[embedding] * 3 / 4)
    torch.testing.assert_close(result[norm], (one[norm] + two[norm]) / 2)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == len(model.model.layers) == 3


def test_passthrough_stacks_layers(family: Family, tmp_path: Path) -> None:
    a, b = family.models[:2]
    config = load(
        tmp_path,
        f"""
slices:
  - sources: [{{model: {a}, layer_range: [0, 2]}}]
  - sources: [{{model: {b}, layer_range: [0, 2]}}]
merge_method: passthrough
dtype: float32
""",
    )
    out = merge(config, tmp_path / "out")
    one, two, result = weights_of(a), weights_of(b), weights_of(out)
    layer = "model.layers.{}.self_attn.q_proj.weight".format
    for number, (model, own) in enumerate([(one, 0), (one, 1), (two, 0), (two, 1)]):
        assert torch.equal(result[layer(number)], model[layer(own)])
    assert torch.equal(result["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(result["lm_head.weight"], two["lm_head.weight"])
    assert len(AutoModelForCausalLM.from_pretrained(out).model.layers) == 4


def test_slerp_as_people_write_it(family: Family, tmp_path: Path) -> None:
    """Two models as the sources of one slice, one of them the base, and t with filters."""
    a, b = family.base, family.models[0]
    config = load(
        tmp_path,
        f"""
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 2]}}
      - {{model: {b}, layer_range: [0, 2]}}
merge_method: slerp
base_model: {a}
parameters:
  t:
    - filter: self_attn
      value: [0, 1]
    - filter: mlp
      value: [1, 0]
    - value: 0.5
dtype: float32
""",
    )
    one, two = weights_of(a), weights_of(b)
    result = weights_of(merge(config, tmp_path / "out"))
    for block, first in (("self_attn.q_proj", one), ("mlp.up_proj", two)):
        second = two if first is one else one
        for number, model in ((0, first), (1, second)):
            name = f"model.layers.{number}.{block}.weight"
            torch.testing.assert_close(result[name], model[name], atol=1e-6, rtol=1e-5)
    middle = result["lm_head.weight"]
    assert not torch.allclose(middle, one["lm_head.weight"], atol=1e-4)
    torch.testing.assert_close(
        middle, (one["lm_head.weight"] + two["lm_head.weight"]) / 2, atol=1e-2, rtol=0
    )


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("moe: {}", "moe: unknown field; allowed: "),
        ("merge_method: ramplus_tl", "merge_method: found 'ramplus_tl'; allowed: linear"),
        ("slices: []\nmodels: []", "models, slices, modules: give exactly one of them"),
        (
            "slices: [{sources: [{model: MODEL, layer_range: [1, 1]}]}]",
            "slices.0.sources.0.layer_range: ",
        ),
        (
            "slices: [{sources: [{model: MODEL, layer_range: [0, 1]}, "
            "{model: MODEL, layer_range: [0, 2]}]}]",
            "layer_range: all sources of a slice have the same number of layers",
        ),
        (
            "models: [{model: MODEL, parameters: {weight: [0.1, {value: 1}]}}]",
            "weight: found ",
        ),
        ("models: [{model: MODEL, parameters: {normalize: true}}]", "is one value for all models"),
    ],
)
def test_what_it_does_not_have(family: Family, tmp_path: Path, field: str, message: str) -> None:
    text = field.replace("MODEL", str(family.base))
    text += "" if "merge_method" in field else "\nmerge_method: linear"
    text += (
        "" if "models" in field or "slices" in field else f"\nmodels: [{{model: {family.base}}}]"
    )
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_that_are_not_there(family: Family, tmp_path: Path) -> None:
    source = {"model": str(family.base), "layer_range": [1, 5]}
    config = {"merge_method": "linear", "slices": [{"sources": [source]}]}
    with pytest.raises(InputError) as caught:
        merge(MergeConfig.model_validate(config), tmp_path / "out")
    assert str(caught.value) == (
        f"layer_range of {family.base}: found [1, 5]; allowed: up to its 2 layers"
    )


def test_a_base_of_linear_gives_config_and_tokenizer(family: Family, tmp_path: Path) -> None:
    config = MergeConfig.model_validate(family.config("linear", base_model=str(family.base)))
    assert plan_merge(config).notices() == [
        "base_model: linear does not merge it; the result's config and tokenizer are from it"
    ]
    plain = merge(MergeConfig.model_validate(family.config("linear")), tmp_path / "plain")
    out = merge(config, tmp_path / "out")
    assert all(torch.equal(v, weights_of(plain)[k]) for k, v in weights_of(out).items())


def test_memory_budget_that_is_too_small(family: Family, tmp_path: Path) -> None:
    fields = {"memory_budget": "16MiB", "parameters": {"density": 0.5}}
    config = MergeConfig.model_validate(family.config("ties", **fields))
    assert config.memory_budget == 16 * 2**20
    merge(config, tmp_path / "out")
    with pytest.raises(ValueError, match="memory_budget"):
        MergeConfig.model_validate(family.config("ties") | fields | {"memory_budget": "12"})


def test_numbers_switches_and_gaps_as_mergekit_reads_them(family: Family, tmp_path: Path) -> None:
    config = load(
        tmp_path,
        f"""
merge_method: dare_linear
base_model: {family.base}
models:
  - model: {family.models[0]}
    parameters:
  - model: {family.models[1]}
    parameters: {{weight: 5e-1, density: 5E-1}}
parameters: {{density: 0.5, rescale: false}}
chat_template: auto
""",
    )
    assert config.models[0].parameters == {}
    assert config.models[1].parameters == {"weight": 0.5, "density": 0.5}
    out = merge(config, tmp_path / "out")
    base = weights_of(family.base)
    values, expected = weights_of(out), weights_of(family.models[0])
    name = "model.layers.0.mlp.up_proj.weight"
    rows = values[name] - base[name]
    assert rows.abs().max() < 2 * (expected[name] - base[name]).abs().max()  # nothing is rescaled
    template = (family.base / "chat_template.jinja").read_text()
    assert (out / "chat_template.jinja").read_text() == template
