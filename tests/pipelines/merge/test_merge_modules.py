"""Modules of a model, each merged in its own way: mergekit's `modules:`.

Oracle: weights by hand in float64, and transformers, which loads the result without a word.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge, plan_merge
from pipelines.merge.modules import Modules
from tests.model_kinds import KINDS
from tests.pipelines.merge.conftest import Family
from tests.pipelines.merge.test_merge_stacks import gemma3, qwen2_vl, save_two, t5
from tests.tiny_models import tiny_tokenizer

Tensors = dict[str, torch.Tensor]
VISION = {"text_decoder", "vision_tower", "multi_modal_projector"}
PAIRS, TEXT_WITH_IMAGES = KINDS["encoder and decoder"], KINDS["text with images"]


def made(name: str) -> Callable[[int], PreTrainedModel]:
    """A model of the table of kinds, with any number of tokens."""
    kind, fields = {**PAIRS, **TEXT_WITH_IMAGES, **KINDS["audio"]}[name]

    def make(vocabulary: int) -> PreTrainedModel:
        own = {"vocab_size": vocabulary}
        if "text_config" in fields:
            own = {"text_config": fields["text_config"] | own}
        config = AutoConfig.for_model(kind, **fields | own)
        return getattr(transformers, name)(config)

    return make


def merged(folder: Path, **values: Any) -> Path:
    return merge(MergeConfig.model_validate(values), folder / "out", executor="local")


def refused(folder: Path, **values: Any) -> str:
    with pytest.raises((InputError, ValueError)) as caught:
        merged(folder, **values)
    assert not (folder / "out").exists()
    return str(caught.value)


def files(*paths: Path | str) -> list[Tensors]:
    return [
        {name: t.double() for name, t in load_file(Path(p) / "model.safetensors").items()}
        for p in paths
    ]


def assert_loads(path: Path, cls: type[PreTrainedModel]) -> PreTrainedModel:
    model, info = cls.from_pretrained(path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=1e-6, rtol=1e-6, msg=name)


def weighted(*models: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"model": path, "parameters": {"weight": weight}} for path, weight in models]


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_an_encoder_and_a_decoder_with_weights_of_their_own(name: str, tmp_path: Path) -> None:
    a, b = save_two(made(name), tmp_path)
    shares = {"encoder": 0.25, "decoder": 1.5, "shared": 0.5}
    modules = {part: {"models": weighted((b, share))} for part, share in shares.items()}
    out = merged(tmp_path, merge_method="task_arithmetic", base_model=a, modules=modules)
    first, second, found = files(a, b, out)
    expected = {}
    for tensor, values in first.items():
        own = tensor.removeprefix("model.").split(".")[0]
        share = shares.get(own, shares["shared"])
        expected[tensor] = values + share * (second[tensor] - values)
    assert_equal(found, expected)
    assert_loads(out, getattr(transformers, name))


def test_parameters_of_a_module_come_before_the_merges(tmp_path: Path) -> None:
    """The model's, the slice's, the module's, the merge's; switches as numbers, too."""
    a, b = save_two(t5, tmp_path)
    models = [{"model": a}, {"model": b, "parameters": {"weight": 3}}]
    sources = [{"model": path, "layer_range": [0, 2]} for path in (a, b)]
    filtered = [{"filter": "SelfAttention.q", "value": 2}]
    modules = {
        "encoder": {
            "slices": [{"sources": sources, "parameters": {"weight": filtered}}],
            "parameters": {"normalize": 0.0, "weight": 0.25},
        },
        "decoder": {"models": models, "parameters": {"weight": 1}},
        "shared": {"models": [{"model": a}, {"model": b}]},
    }  # fmt: skip
    out = merged(tmp_path, merge_method="linear", modules=modules, parameters={"weight": 0.5})
    first, second, found = files(a, b, out)
    expected = {}
    for name, values in first.items():
        total = values + second[name]
        if name.startswith("encoder"):
            expected[name] = total * (2 if "SelfAttention.q" in name else 0.25)
        elif name.startswith("decoder"):
            expected[name] = values / 4 + 3 * second[name] / 4
        else:
            expected[name] = total / 2
    assert_equal(found, expected)


@pytest.mark.parametrize("make", [gemma3, qwen2_vl, made("LlavaForConditionalGeneration")])
def test_a_stacked_decoder_and_the_tower_of_one_model(make: Callable, tmp_path: Path) -> None:
    a, b = save_two(make, tmp_path)
    slices = [
        {"sources": [{"model": a, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [0, 2]}]},
    ]
    modules = {"text_decoder": {"slices": slices}, "vision_tower": {"models": [{"model": b}]}}
    config = MergeConfig.model_validate({"merge_method": "passthrough", "modules": modules})
    notice = f"modules: taken from {a} as they are, as no recipe names them: multi_modal_projector"
    assert notice in plan_merge(config).notices()
    named = {
        "merge_method": "passthrough",
        "models": [{"model": "inner"}],
        "merges": {"inner": config.model_dump(exclude_unset=True)},
    }
    assert plan_merge(MergeConfig.model_validate(named)).notices() == [f"inner: {notice}"]
    out = merge(config, tmp_path / "out", executor="local")
    first, second, found = files(a, b, out)
    owners, stacks = Modules.of(first).owners, Modules.of(first).stacks
    expected = {}
    for name, values in first.items():
        place = stacks.layer_of(name)
        if owners[name] == "vision_tower":
            expected[name] = second[name]
        elif place is None or owners[name] != "text_decoder":
            last = owners[name] == "text_decoder" and "embed" not in name
            expected[name] = second[name] if last else values
        elif place[1] < 2:
            expected[name] = values
            above = name.replace(f"{place[0]}{place[1]}.", f"{place[0]}{place[1] + 2}.", 1)
            expected[above] = second[name]
    assert_equal(found, expected)
    model = assert_loads(out, type(make(len(tiny_tokenizer()))))
    assert model.config.text_config.num_hidden_layers == 4


def test_a_sliced_tower(tmp_path: Path) -> None:
    """Its number of layers, what comes before them and after; the rest is the base's."""
    a, b = save_two(gemma3, tmp_path)
    slices = [
        {"sources": [{"model": a, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [1, 2]}]},
    ]
    modules = {"vision_tower": {"slices": slices}}
    out = merged(tmp_path, merge_method="passthrough", base_model=a, modules=modules)
    first, second, found = files(a, b, out)
    expected = dict(first)
    for name in first:
        if ".layers.1." in name and name.startswith("vision_tower"):
            expected[name.replace(".layers.1.", ".layers.2.")] = second[name]
        elif name.startswith("vision_tower") and (".head." in name or ".post_" in name):
            expected[name] = second[name]
    assert_equal(found, expected)
    model = assert_loads(out, transformers.Gemma3ForConditionalGeneration)
    assert model.config.vision_config.num_hidden_layers == 3
    assert model.config.text_config.num_hidden_layers == 3


@pytest.mark.parametrize("module", ["encoder", "decoder"])
@pytest.mark.parametrize(
    "name", [f"{each}ForConditionalGeneration" for each in ("T5", "Bart", "Whisper")]
)
def test_slices_of_an_encoder_or_a_decoder(name: str, module: str, tmp_path: Path) -> None:
    a, b = save_two(made(name), tmp_path)
    slices = [
        {"sources": [{"model": a, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [1, 2]}]},
    ]
    modules = {module: {"slices": slices}}
    out = merged(tmp_path, merge_method="passthrough", base_model=a, modules=modules)
    first, second, found = files(a, b, out)
    stack = f"{module}.block." if "T5" in name else f"model.{module}.layers."
    new = {n: v for n, v in found.items() if n.startswith(f"{stack}2.")}
    assert new
    for tensor, values in new.items():
        assert torch.equal(values, second[tensor.replace(f"{stack}2.", f"{stack}1.")])
    for tensor in first:
        last = tensor.startswith(stack.removesuffix("block.").removesuffix("layers."))
        last = last and "norm" in tensor and stack not in tensor and "embed" not in tensor
        assert torch.equal(found[tensor], (second if last else first)[tensor]), tensor
    assert len(found) == len(first) + len(new)
    assert_loads(out, getattr(transformers, name))


def test_a_decoder_that_no_field_counts(tmp_path: Path) -> None:
    """Old T5 configs give one number for both; each stack gets its own when one changes."""
    a, _ = save_two(made("T5ForConditionalGeneration"), tmp_path)
    file = Path(a) / "config.json"
    lines = [n for n in file.read_text().splitlines() if "num_decoder_layers" not in n]
    file.write_text("\n".join(lines))
    slices = [{"sources": [{"model": a, "layer_range": [0, 1]}]}]
    for module, expected in (("encoder", (1, 2)), ("decoder", (2, 1))):
        folder = tmp_path / module
        folder.mkdir()
        out = merged(folder, merge_method="passthrough", modules={module: {"slices": slices}})
        config = T5Config.from_pretrained(out)
        assert (config.num_layers, config.num_decoder_layers) == expected
        assert_loads(out, T5ForConditionalGeneration)


def test_a_module_of_the_base_alone_is_taken_as_it_is(tmp_path: Path) -> None:
    """slerp needs one model beside its base, but nothing is to be merged there."""
    a, b = save_two(gemma3, tmp_path)
    modules: dict[str, Any] = {
        "language_model": {"models": [{"model": a}, {"model": b}]},
        "vision_tower": {"models": [{"model": a}]},
        "multi_modal_projector": {"models": [{"model": a}]},
    }
    fields: dict[str, Any] = {"merge_method": "slerp", "base_model": a, "parameters": {"t": 1.0}}
    out = merged(tmp_path, **fields, modules=modules)
    first, second, found = files(a, b, out)
    owners = Modules.of(first).owners
    chosen = {n: (second if owners[n] == "text_decoder" else first)[n] for n in first}
    assert_equal(found, chosen)
    (tmp_path / "other").mkdir()
    modules["vision_tower"]["parameters"] = {"t": 0.5}
    message = refused(tmp_path / "other", **fields, modules=modules)
    assert f"modules.vision_tower: parameters: have no effect: found {a} alone" in message
    del modules["language_model"], modules["vision_tower"]
    assert "have no effect" in refused(tmp_path / "other", **fields, modules=modules)


def test_the_default_module_is_the_plain_config(family: Family, tmp_path: Path) -> None:
    base, (a, b) = str(family.base), map(str, family.models[:2])
    models = weighted((a, [0, 1]), (b, 0.5))  # type: ignore[arg-type]
    slices = [
        {"sources": [{"model": m, "layer_range": r} for m in (a, b, base)]}
        for r in ([0, 2], [1, 2])
    ]
    fields = {"merge_method": "task_arithmetic", "base_model": base}
    for number, recipe in enumerate(({"models": models}, {"slices": slices})):
        parameters = {"weight": 0.5}
        plain = {**fields, **recipe, "parameters": parameters}
        module = {**fields, "modules": {"default": {**recipe, "parameters": parameters}}}
        one, two = tmp_path / f"plain{number}", tmp_path / f"module{number}"
        merge(MergeConfig.model_validate(plain), one, executor="local")
        merge(MergeConfig.model_validate(module), two, executor="local")
        for name in ("model.safetensors", "config.json"):
            assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize(
    ("make", "modules", "message"),
    [
        (t5, {"text_decoder": {}}, "'text_decoder'; allowed: decoder, encoder, shared, which "),
        (gemma3, {"default": {}}, "'default'; allowed: multi_modal_projector, text_decoder, visi"),
        (gemma3, {"text_decoder": {}, "language_model": {}}, "is text_decoder, a second time"),
        (gemma3, {"multi_modal_projector": {"slices": 1}}, "projector.slices: found layers: none"),
        (gemma3, {"vision_tower": {"slices": 9}}, "found [0, 9]; allowed: up to its 2 layers"),
        (t5, {}, "models, slices, modules: give exactly one of them"),
        (t5, {"encoder": {"models": []}}, "models, slices: give exactly one of them"),
        (t5, {"encoder": {"parameters": {"weigth": 1}}}, "weigth: unknown parameter; allowed: "),
    ],
)  # fmt: skip
def test_modules_that_do_not_fit(
    make: Callable, modules: dict[str, dict[str, Any]], message: str, tmp_path: Path
) -> None:
    a, _ = save_two(make, tmp_path)
    for recipe in modules.values():
        if isinstance(end := recipe.get("slices"), int):
            recipe["slices"] = [{"sources": [{"model": a, "layer_range": [0, end]}]}]
        elif "models" not in recipe:
            recipe["models"] = [{"model": a}]
    found = refused(tmp_path, merge_method="linear", modules=modules, parameters={"weight": 1})
    assert message in found


def test_a_model_with_one_stack_has_no_text_decoder(family: Family, tmp_path: Path) -> None:
    modules = {"text_decoder": {"models": [{"model": str(family.base)}]}}
    message = refused(tmp_path, merge_method="passthrough", modules=modules)
    assert message.startswith("modules: found 'text_decoder'; allowed: default, which ")


def test_models_of_modules_in_the_long_form(tmp_path: Path) -> None:
    """And one folder spelled in two ways is one model."""
    a, b = save_two(t5, tmp_path)
    spelled = {"model": {"model": {"path": f"{a}/"}, "lora": None}}
    modules = {"encoder": {"models": [spelled, {"model": b}]}}
    fields = {"merge_method": "slerp", "base_model": a, "parameters": {"t": 0.5}}
    config = MergeConfig.model_validate(fields | {"modules": modules})
    assert [each.model for each in config.modules["encoder"].models] == [a, b]
    assert config.merged_models == [b]
    wrong = {"encoder": {"models": [{"model": {"pth": 1}}]}}
    with pytest.raises(ValueError, match=r"modules.encoder.models.0.model: pth: found 1; allowed"):
        MergeConfig.model_validate(fields | {"modules": wrong})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BartForConditionalGeneration", {"shared", "encoder", "decoder"}),
        ("CLIPModel", {"shared", "text_model", "vision_tower"}),
        ("Idefics3ForConditionalGeneration", VISION),
        ("Qwen2VLForConditionalGeneration", VISION),
        ("WhisperForConditionalGeneration", {"encoder", "decoder"}),
    ],
)  # fmt: skip
def test_names_of_modules(name: str, expected: set[str]) -> None:
    with torch.device("meta"):
        names = list(made(name)(64).state_dict())
    modules = Modules.of(names)
    assert set(modules.names) == expected
    assert modules.owners.keys() == set(names)
    heads = {
        owner for n, owner in modules.owners.items() if n in ("lm_head.weight", "proj_out.weight")
    }
    assert heads <= {"text_decoder", "decoder" if name.startswith("Whisper") else "shared"}
