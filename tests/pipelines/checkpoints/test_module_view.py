"""Checkpoints as their models name them.

Oracles: transformers' `from_pretrained`, and torch's own functions on whole tensors.
"""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    PermuteForRope,
    Transpose,
)

from pipelines.checkpoints import Checkpoint, CheckpointDelta, ModuleView
from pipelines.checkpoints.composition import Composition, concatenated, stacked
from pipelines.checkpoints.module_view import copied_tensors
from pipelines.checkpoints.naming import stored_names
from pipelines.errors import InputError
from tests.hub_models import ARCHITECTURES, WEIGHTS, random_model, save_as_on_hub

EXPERTS = [name for name, fields in ARCHITECTURES.items() if "num_experts_per_tok" in fields]


def empty(path: Path) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    return model


def opened(path: Path) -> ModuleView:
    return ModuleView.of(Checkpoint.open(path), empty(path))


def some_ranges(size: int, seed: int) -> list[tuple[int, int]]:
    """The whole, nothing, single elements at both ends, and ranges of odd beginnings and ends."""
    draw = random.Random(seed)
    ranges = [sorted(draw.choices(range(size + 1), k=2)) for _ in range(6)]
    return [(0, size), (size, size), (0, 1), (size - 1, size), *((a, b) for a, b in ranges)]


def check_view(path: Path) -> ModuleView:
    """Every parameter, whole and by ranges, is that of `from_pretrained`; what is written back is
    the file.
    """
    view = opened(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    expected = model.state_dict()
    assert {name for name in expected if view.find(name) is not None} == set(expected)
    file = load_file(path / WEIGHTS)
    back = {name: torch.full_like(tensor, 77) for name, tensor in file.items()}
    for number, (name, tensor) in enumerate(expected.items()):
        spec, flat = view.find(name), tensor.reshape(-1)
        assert spec is not None and spec.shape == tensor.shape
        for start, stop in some_ranges(flat.numel(), number):
            found = view.read(name, start, stop)  # transformers keeps some biases in float32
            assert torch.equal(found.to(flat.dtype), flat[start:stop]), (name, start, stop)
        cuts = sorted({0, flat.numel(), *random.Random(number).choices(range(flat.numel()), k=3)})
        for start, stop in pairwise(cuts):
            for part in view.parts(name, start, flat[start:stop].to(spec.dtype)):
                place = slice(part.start, part.start + part.values.numel())
                back[part.name].view(-1)[place] = part.values
    for name in copied_tensors(view, expected):
        back[name] = view.source.read(name, 0, file[name].numel()).view(file[name].shape)
    assert all(torch.equal(back[name], tensor) for name, tensor in file.items())
    return view


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_as_on_the_hub(name: str, tmp_path: Path) -> None:
    """Names and layouts of nineteen architectures, both ways."""
    naming = check_view(save_as_on_hub(name, tmp_path, dtype=torch.bfloat16)).naming
    assert not naming.missing and not naming.misfits and not naming.unexpected
    masks = ["h.0.attn.bias", "h.1.attn.bias"] if name == "gpt2" else []
    assert naming.ignored == masks


@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts(name: str, tmp_path: Path) -> None:
    """The layout of the model itself is read, too, and is the same model."""
    one = check_view(save_as_on_hub(name, tmp_path / "hub"))
    other = check_view(save_as_on_hub(name, tmp_path / "fused", fused=True))
    assert set(one.source.names()) > {"lm_head.weight"}
    assert set(one.source.names()) != set(other.source.names())
    for parameter in empty(tmp_path / "hub").state_dict():
        assert torch.equal(one.read(parameter), other.read(parameter))


def test_names_both_ways(tmp_path: Path) -> None:
    """Which stored tensors a parameter consists of, in order, and the parameters of each."""
    naming = opened(save_as_on_hub("mixtral", tmp_path)).naming
    experts = "model.layers.1.block_sparse_moe.experts"
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    assert naming.parameters[fused].names == [
        f"{experts}.{number}.{name}.weight" for number in range(4) for name in ("w1", "w3")
    ]
    assert naming.parameters_of(f"{experts}.2.w3.weight") == [fused]
    assert naming.parameters_of("nothing") == []


def test_of_a_base_model(tmp_path: Path) -> None:
    """Pythia's layers are under `gpt_neox`, and its head is called otherwise on the hub."""
    names = set(Checkpoint.open(save_as_on_hub("gpt_neox", tmp_path)).tensors)
    assert "embed_out.weight" in names
    assert opened(tmp_path).naming.parameters["lm_head.weight"].names == ["embed_out.weight"]


def test_what_is_missing_and_what_is_too_much(tmp_path: Path) -> None:
    """By the names of the model, and by those of the files."""
    model = empty(save_as_on_hub("mixtral", tmp_path))
    shapes = {name: t.shape for name, t in Checkpoint.open(tmp_path).tensors.items()}
    del shapes["model.norm.weight"]
    shapes["lm_head.weight"] = (1, 32)
    shapes["more.weight"] = (3,)
    naming = stored_names(model, shapes)
    assert naming.missing == ["model.norm.weight"]
    assert naming.misfits == {"lm_head.weight": (len(model.get_input_embeddings().weight), 32)}
    assert naming.unexpected == ["more.weight"] and naming.ignored == []


def test_an_expert_too_few(tmp_path: Path) -> None:
    """Half an expert cannot be fused, a whole one leaves a wrong shape."""
    model = empty(save_as_on_hub("mixtral", tmp_path))
    shapes = {name: t.shape for name, t in Checkpoint.open(tmp_path).tensors.items()}
    experts = "model.layers.0.block_sparse_moe.experts.3"
    del shapes[f"{experts}.w2.weight"]
    assert stored_names(model, shapes).misfits == {
        "model.layers.0.mlp.experts.down_proj": (4, 32, 48)
    }
    del shapes[f"{experts}.w1.weight"]
    message = r"here: model.layers.0.mlp.experts.gate_up_proj: cannot be made of model.layers.0.blo"
    with pytest.raises(InputError, match=message):
        stored_names(model, shapes, "here")


def test_experts_stored_twice_are_refused(tmp_path: Path) -> None:
    """It is unclear which of them are meant."""
    save_as_on_hub("mixtral", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 32, 48)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    message = (
        r"model .*: model.layers.0.mlp.experts.down_proj: found twice, as model.layers.0.block_spa"
        r"rse_moe.experts.0.w2.weight and as model.layers.0.mlp.experts.down_proj; allowed: one"
    )
    with pytest.raises(InputError, match=message):
        opened(tmp_path)


def test_a_conversion_that_is_not_known_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is guessed."""

    def convert(self: Transpose, input_dict: dict[str, list[Tensor]], *a: object, **k: object):  # type: ignore[no-untyped-def]
        return {name: torch.exp(tensors[0]) for name, tensors in input_dict.items()}

    monkeypatch.setattr("transformers.core_model_loading.MergeModulelist.convert", convert)
    save_as_on_hub("mixtral", tmp_path)
    message = r"w1.weight by MergeModulelist\(dim=0\), .*, which is not known here \(torch.exp\)$"
    with pytest.raises(InputError, match=message):
        opened(tmp_path)


def test_the_delta_of_two_layouts(tmp_path: Path) -> None:
    """One checkpoint with its experts one by one, the other with fused ones."""
    base = save_as_on_hub("qwen3_moe", tmp_path / "base", seed=1)
    tuned = save_as_on_hub("qwen3_moe", tmp_path / "tuned", seed=2, fused=True)
    delta = CheckpointDelta(base, tuned)
    one, other = random_model("qwen3_moe", 1), random_model("qwen3_moe", 2)
    for (name, before), after in zip(one.named_parameters(), other.parameters(), strict=True):
        assert delta.shape(name) == before.shape
        expected = (after - before).detach().view(-1)[3:40]
        assert torch.equal(delta.read(name, 3, 3 + len(expected)), expected)


# --- every operation of torch that transformers' conversions use, against torch itself


def made(composition: Composition, stored: dict[str, Tensor]) -> Tensor:
    """The tensor that a composition describes."""
    result = torch.full(composition.shape, -1)
    for piece in composition.pieces:
        place = tuple(slice(a, a + n) for a, n in zip(piece.at, piece.shape, strict=True))
        result[place] = stored[piece.name].as_strided(piece.shape, piece.strides, piece.start)
    return result


def assert_same(change: Callable[..., object], *shapes: tuple[int, ...]) -> None:
    """A function of tensors gives the same on their compositions."""
    stored, first = {}, 0
    for number, shape in enumerate(shapes):
        size = int(torch.tensor(shape).prod())
        stored[str(number)] = torch.arange(first, first + size).view(shape)
        first += size
    parts = [Composition.of_stored(name, tensor.shape) for name, tensor in stored.items()]
    found, expected = change(*parts), change(*stored.values())
    if isinstance(found, Composition):
        found, expected = [found], [expected]
    for one, other in zip(found, expected, strict=True):  # type: ignore[call-overload]
        assert torch.equal(made(one, stored), other)


def test_the_operations_of_torch() -> None:
    """Alone and after one another, so that pieces are cut at places that are not theirs."""
    assert_same(lambda a, b: torch.cat([a, b], dim=1), (2, 3, 4), (2, 5, 4))
    assert_same(lambda a, b: torch.stack([a, b], dim=-1), (2, 3), (2, 3))
    assert_same(lambda a: torch.chunk(a, 3, dim=1), (2, 7))
    assert_same(lambda a: torch.unbind(a, dim=1), (2, 3, 4))
    assert_same(lambda a: torch.transpose(a, dim0=0, dim1=-1).contiguous(), (2, 3, 4))
    assert_same(lambda a: a.reshape(4, 3, -1).transpose(0, 1).reshape(12, 2), (24,))
    assert_same(lambda a: a.view(3, 1, 4).squeeze().unsqueeze(0), (12,))
    assert_same(lambda a: a.transpose(0, 1).reshape(-1), (3, 4))
    assert_same(lambda a, b: torch.cat([a, b]).view(2, 5).transpose(0, 1).reshape(10), (3,), (7,))
    assert_same(lambda a, b: torch.cat([a, b], 1).reshape(2, 5, 2).chunk(5, 1)[2], (2, 3), (2, 7))
    assert_same(lambda a: a.view(2, 3, 2, 2).transpose(1, 2).reshape(12, 2), (12, 2))
    assert_same(lambda a: a.reshape(1).unsqueeze(0), ())


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        (Interleave(0), (6, 4)),
        (Interleave(1, inverse=True), (3, 6, 2)),
        (Transpose(1, 2), (3, 4, 5)),
        (PermuteForRope(permute_layer_names=["q"]), (16, 3)),
        (PermuteForRope(permute_layer_names=["q"], inverse=True), (16,)),
        (Concatenate(0), (4, 2)),
    ],
)
def test_the_operations_of_transformers(operation: ConversionOps, shape: tuple[int, ...]) -> None:
    """Those that the architectures above do not have."""
    config = AutoConfig.for_model("llama", num_attention_heads=2)

    def change(tensor: Tensor) -> Tensor:
        made = operation.convert({"q": [tensor]}, ["q"], ["q"], config=config)
        return made["q"][0] if isinstance(made["q"], list) else made["q"]

    assert_same(change, shape)


def test_shapes_that_do_not_fit() -> None:
    """As torch refuses them."""
    one, other = Composition.of_stored("a", (2, 3)), Composition.of_stored("b", (3, 3))
    with pytest.raises(ValueError, match="do not fit"):
        stacked([one, other])
    with pytest.raises(ValueError, match="do not fit"):
        concatenated([one, other], dim=1)
    with pytest.raises(ValueError, match="cannot be viewed"):
        one.view(4, 2)
