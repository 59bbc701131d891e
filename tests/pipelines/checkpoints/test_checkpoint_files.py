"""Checkpoints on the disk: read by slice, written in place, both as safetensors has them.

Oracle: the safetensors library, as reader and as writer.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipelines.checkpoints import Checkpoint, CheckpointDelta, plan_layout
from pipelines.checkpoints.safetensors_header import build_header, read_header
from pipelines.errors import InputError
from tests.tiny_models import save_tiny_llama

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "whole": torch.arange(3),
    "flags": torch.tensor([True, False]),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return Checkpoint.open(tmp_path)


def test_every_range_of_every_tensor(checkpoint: Checkpoint) -> None:
    assert checkpoint.num_elements == sum(t.numel() for t in TENSORS.values())
    for name, tensor in TENSORS.items():
        flat = tensor.reshape(-1)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        for start in range(flat.numel() + 1):
            for stop in range(start, flat.numel() + 1):
                read = checkpoint.read(name, start, stop)
                assert read.dtype == tensor.dtype
                assert torch.equal(read, flat[start:stop])


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    limit=st.integers(1, 300),
    cuts=st.integers(1, 17),
)
def test_written_in_any_pieces_the_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, cuts: int
) -> None:
    folder = tmp_path_factory.mktemp("written")
    tensors = {f"t{i}": torch.randn(size) for i, size in enumerate(sizes)}
    layout = plan_layout({k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, limit)
    layout.create(folder)
    for name, values in reversed(tensors.items()):
        for start in range(0, values.numel(), cuts):
            layout.write(folder, name, start, values[start : start + cuts])
    layout.sync(folder)
    found: dict[str, torch.Tensor] = {}
    for file in layout.headers:
        assert (folder / file).stat().st_size == layout.sizes[file]
        found |= load_file(folder / file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    if len(layout.headers) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == 4 * sum(sizes)


def test_files_of_an_earlier_attempt_stay(tmp_path: Path) -> None:
    layout = plan_layout({"a": (torch.float32, (4,))}, 100)
    layout.create(tmp_path)
    layout.write(tmp_path, "a", 0, torch.ones(4))
    layout.create(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(4))


def test_header_data_begin_at_a_multiple_of_eight(tmp_path: Path) -> None:
    header = build_header({"name": (torch.float32, (2, 3))})
    assert len(header) % 8 == 0
    file = tmp_path / "x.safetensors"
    file.write_bytes(header + bytes(24))
    assert read_header(file)["name"].offset == len(header)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_header_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever becomes of a header's text, it is read or refused, never a crash."""
    folder = tmp_path_factory.mktemp("damaged")
    file = folder / "model.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(2)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 21))
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        read_header(file)
    except InputError as error:
        assert str(error).startswith(str(file))
        assert "\n" not in str(error).replace(repr("\n"), "")


@pytest.mark.parametrize("header", ["[]", '{"a": 1}', '{"a": {"dtype": "F32"}}', "{}x"])
def test_headers_of_another_form(tmp_path: Path, header: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(InputError, match="its safetensors header is damaged"):
        read_header(file)


def test_missing_shard(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value) == (
        f"model {tmp_path}: model.safetensors.index.json names "
        "model-00001-of-00002.safetensors, which is missing"
    )


@pytest.mark.parametrize("what", ["config", "index"])
def test_damaged_json(tmp_path: Path, what: str) -> None:
    (tmp_path / "config.json").write_text("{" if what == "config" else "{}")
    file = tmp_path / ("config.json" if what == "config" else "model.safetensors.index.json")
    if what == "config":
        save_file(TENSORS, tmp_path / "model.safetensors")
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(InputError) as caught:
            Checkpoint.open(tmp_path)
        assert str(caught.value).startswith(f"{file}: not valid JSON")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json; expected a Hugging Face checkpoint"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no model\.safetensors and no model\.safetensors\.index"):
        Checkpoint.open(tmp_path)


def test_a_delta_by_slice_is_in_float32(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", seed=0, dtype=torch.bfloat16)
    tuned = save_tiny_llama(tmp_path / "tuned", seed=1, dtype=torch.bfloat16)
    delta = CheckpointDelta(base, tuned)
    name = "model.layers.1.mlp.up_proj.weight"
    files = [load_file(path / "model.safetensors")[name].float() for path in (base, tuned)]
    expected = (files[1] - files[0]).reshape(-1)
    assert delta.shape(name) == (48, 32)
    assert delta.shape("none") is None
    assert torch.equal(delta.read(name, 100, 333), expected[100:333])


def test_a_delta_of_the_rows_that_both_have(tmp_path: Path) -> None:
    """Tokens were added to the tuned model, whose head is its embedding."""
    base = save_tiny_llama(tmp_path / "base", seed=0)
    tuned = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "tuned", seed=1))
    rows, width = tuned.get_input_embeddings().weight.shape
    tuned.resize_token_embeddings(rows + 3)
    tuned.save_pretrained(tmp_path / "larger")
    delta = CheckpointDelta(base, tmp_path / "larger")
    name = "model.embed_tokens.weight"
    assert delta.shape(name) == (rows, width)
    before = load_file(base / "model.safetensors")[name]
    after = load_file(tmp_path / "larger" / "model.safetensors")[name]
    assert torch.equal(
        delta.read(name, width, rows * width), (after[:rows] - before).reshape(-1)[width:]
    )
