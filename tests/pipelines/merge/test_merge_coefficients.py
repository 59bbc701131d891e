"""Merges by learned coefficients (DAM). Oracle: the formula in float64, `linear`, and the base."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge, plan_merge
from pipelines.merge.coefficients import Coefficients, Settings, read_coefficients
from pipelines.merge.verify import verify
from tests.pipelines.merge.conftest import Family, fine_tune, save_weights, weights_of
from tests.tiny_models import save_tiny_gpt2, save_tiny_llama

Tensors = dict[str, Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def is_layer(name: str) -> bool:
    """Whether a tensor of a tiny Llama is a linear layer's, by its name."""
    return "proj" in name or name == HEAD


def drawn(tensors: Tensors, num_experts: int, wanted: Callable[[str], bool]) -> Tensors:
    """Random coefficients of the wanted tensors."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        name: (num_experts,) if name.endswith("proj.bias") else (num_experts, each.shape[-1])
        for name, each in tensors.items()
        if wanted(name)
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(path: Path, family: Family, tensors: Tensors, **settings: bool) -> Path:
    """A file of coefficients of a family's models."""
    models = [str(model) for model in family.models]
    own = Settings(models=models, base_model=str(family.base), **settings)
    Coefficients(str(path), own, tensors).write(path)
    return path


def merged(family: Family, file: Path | list[Path], out: Path, **fields: object) -> Path:
    """A merge by the coefficients in a file, with the local executor."""
    files = str(file) if isinstance(file, Path) else [str(each) for each in file]
    config = family.config("dam", coefficients=files, **fields)
    return Path(merge(MergeConfig.model_validate(config), out))


def formula(tensors: list[Tensor], own: Tensor) -> Tensor:
    """`sum_i W_i diag(c_i)` in float64."""
    return sum(w.double() * c.double() for w, c in zip(tensors, own, strict=True))


@pytest.fixture
def file(family: Family, tmp_path: Path) -> Path:
    """Random coefficients of the linear layers."""
    own = drawn(weights_of(family.base), 3, is_layer)
    return write(tmp_path / "dam.safetensors", family, own)


def test_layers_are_the_formula_and_the_rest_is_the_base(
    family: Family, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of any size give the same bytes; a second run keeps the result; all again gives it."""
    found = weights_of(out := merged(family, file, tmp_path / "out"))
    base, models = weights_of(family.base), [weights_of(path) for path in family.models]
    own = load_file(file)
    for name, values in found.items():
        if name in own:
            wanted = formula([model[name] for model in models], own[name])
            torch.testing.assert_close(values.double(), wanted, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(values, base[name])
    assert verify(out, again=True).again
    monkeypatch.setattr("pipelines.merge.tensor.CHUNK_ELEMENTS", 77)
    monkeypatch.setattr("pipelines.merge.plan.PIECE_ELEMENTS", 231)
    monkeypatch.setattr("operators.merging.entry.CHUNK", 50)
    stepped = weights_of(merged(family, file, tmp_path / "stepped"))
    assert all(torch.equal(stepped[name], values) for name, values in found.items())


def test_equal_coefficients_are_linear(family: Family, tmp_path: Path) -> None:
    layers = drawn(weights_of(family.base), 3, is_layer)
    equal = {name: torch.full_like(each, 1 / 3) for name, each in layers.items()}
    file = write(tmp_path / "equal.safetensors", family, equal)
    found = weights_of(merged(family, file, tmp_path / "out"))
    config = MergeConfig.model_validate(family.config(parameters={"weight": 1.0}))
    linear = weights_of(Path(merge(config, tmp_path / "linear")))
    for name in equal:
        torch.testing.assert_close(found[name], linear[name], rtol=1e-6, atol=1e-8)


def test_biases_norms_a_tied_embedding_and_the_base_as_an_expert(tmp_path: Path) -> None:
    """bf16 out is the float32 sum rounded once."""
    base = save_tiny_llama(tmp_path / "base", tied=True, attention_bias=True)
    models = tuple(fine_tune(base, tmp_path / f"model-{i}", seed=i) for i in (1, 2))
    family = Family(base, models)
    own = drawn(weights_of(base), 3, lambda name: True)
    settings = {"embeddings": True, "norms": True, "include_base": True, "lm_head": False}
    file = write(tmp_path / "dam.safetensors", family, own, **settings)
    found = weights_of(merged(family, file, tmp_path / "out"))
    experts = [weights_of(path) for path in (*models, base)]
    assert found.keys() == own.keys() == experts[0].keys()
    for name, values in found.items():
        wanted = formula([expert[name] for expert in experts], own[name])
        torch.testing.assert_close(values.double(), wanted, rtol=1e-6, atol=1e-7)
    small = weights_of(merged(family, file, tmp_path / "small", dtype="bfloat16"))
    assert all(torch.equal(small[name], values.bfloat16()) for name, values in found.items())


def test_the_mean_of_several_files(family: Family, file: Path, tmp_path: Path) -> None:
    first = read_coefficients(str(file)).tensors
    second = {name: each.flip(0) for name, each in first.items()}
    other = write(tmp_path / "other.safetensors", family, second)
    mean = {name: (each + second[name]) / 2 for name, each in first.items()}
    whole = weights_of(
        merged(family, write(tmp_path / "mean.safetensors", family, mean), tmp_path / "mean")
    )
    found = weights_of(merged(family, [file, other], tmp_path / "out"))
    for name, values in found.items():
        torch.testing.assert_close(values, whole[name], rtol=1e-6, atol=1e-7)


def test_edited_coefficients_are_another_merge(family: Family, file: Path, tmp_path: Path) -> None:
    """A finished output is not taken for theirs, nor is unfinished work gone on with."""
    out = merged(family, file, tmp_path / "out")
    assert merged(family, file, out) == out
    config = MergeConfig.model_validate(family.config("dam", coefficients=str(file)))
    key = plan_merge(config).key
    edited = {name: each * 2 for name, each in load_file(file).items()}
    write(file, family, edited)
    assert pickle.loads(pickle.dumps(plan_merge(config))).key != key
    with pytest.raises(InputError, match="out"):
        merged(family, file, out)


def refused(family: Family, file: Path, tmp_path: Path, **fields: object) -> str:
    """The message of a merge that must not be."""
    with pytest.raises(InputError) as error:
        merged(family, file, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_files_that_do_not_fit_are_refused(family: Family, file: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    own, base = load_file(file), family.base
    start = f"coefficients: {file}: "
    cases: list[tuple[Tensors, str]] = [
        ({k: v for k, v in own.items() if k != name}, f"has none of {name}, which {base} merges"),
        (own | {"x.weight": own[name]}, f"has some of x.weight, which {base} does not have"),
        (
            own | {EMBEDDING: own[name]},
            f"has some of {EMBEDDING}, which {base} does not merge by the file's settings",
        ),
        (
            own | {name: own[name][:, :-1]},
            f"{name}: found shape [3, 31]; allowed: [3, 32], for 3 experts of {base}",
        ),
        (own | {name: own[name] / 0}, f"{name}: found NaN or Inf; allowed: finite torch.float32"),
        (
            own | {name: own[name].half()},
            f"{name}: found torch.float16; allowed: finite torch.float32",
        ),
    ]
    for tensors, message in cases:
        write(file, family, tensors)
        assert refused(family, file, tmp_path) == start + message
    save_file(own, file)  # without settings
    assert refused(family, file, tmp_path) == (
        start + "its metadata has no 'coefficients'; allowed: a dam.safetensors of DAM"
    )
    file.unlink()
    assert refused(family, file, tmp_path).startswith(start + "cannot be read: ")


def test_other_experts_are_refused(family: Family, file: Path, tmp_path: Path) -> None:
    two = [{"model": str(model)} for model in family.models[:2]]
    found = refused(family, file, tmp_path, models=two)
    assert "found 2 models with lm_head.weight; allowed: 3, in this order: " in found
    other = Family(family.base, family.models[::-1])
    mixed = write(tmp_path / "other.safetensors", other, load_file(file))
    with pytest.raises(InputError, match="found other experts, settings or tensors than in "):
        merged(family, [file, mixed], tmp_path / "out")


def test_models_that_have_no_such_layers_are_refused(tmp_path: Path) -> None:
    """Transposed layers by name; a head that is its embedding, or that only some models tie."""
    base = save_tiny_gpt2(tmp_path / "gpt2")
    family = Family(base, (fine_tune(base, tmp_path / "gpt2-1", seed=1),))
    file = write(tmp_path / "dam.safetensors", family, {})
    name = "transformer.h.0.attn.c_attn.weight"
    assert refused(family, file, tmp_path).startswith(f"{base}: {name}: is stored as (in, out); ")

    base = save_tiny_llama(tmp_path / "tied", tied=True)
    one = fine_tune(base, tmp_path / "tied-1", seed=1)
    family = Family(base, (one,))
    own = drawn(weights_of(base), 1, is_layer)
    write(file, family, own | {HEAD: torch.ones(1, 32)})
    message = f"coefficients: {file}: has some of {HEAD}, which {base} "
    assert refused(family, file, tmp_path) == message + "does not have"

    write(file, family, own)
    untied = copytree(one, tmp_path / "untied")
    save_weights(untied, weights_of(one) | {HEAD: weights_of(one)[EMBEDDING] * 2})
    found = refused(Family(base, (untied,)), file, tmp_path)
    assert found.startswith(f"{base}: ties {HEAD} to its embedding, but a model has a head of ")


CONFIGS: list[tuple[dict[str, object], str]] = [
    (
        {"merge_method": "linear", "coefficients": "x"},
        "coefficients: has no effect with linear; allowed with dam",
    ),
    ({"coefficients": None}, "coefficients: required, not given; allowed: a file, or a list of"),
    ({"coefficients": []}, "coefficients: required, not given; allowed: a file, or a list of"),
    ({"allow_missing": ["x"]}, "allow_missing: cannot be used with dam; allowed: models, whole"),
    ({"parameters": {"weight": 1}}, "weight: unknown parameter; allowed: none"),
    ({"base_model": None}, "base_model: required, not given"),
]


@pytest.mark.parametrize(("fields", "message"), CONFIGS)
def test_configs_that_cannot_be(family: Family, fields: dict[str, object], message: str) -> None:
    config = family.config("dam", coefficients="x") | fields
    with pytest.raises(ValueError, match=re.escape(message)):
        MergeConfig.model_validate(config)
