"""Digests of models. Oracle: their definition, as written out in digest_definition.py."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pipelines.checkpoints import Checkpoint, plan_layout
from pipelines.checkpoints.companions import companions_of
from pipelines.checkpoints.digests import (
    BlockDigests,
    changed_parts,
    identity,
    model_digest,
)
from pipelines.merge import MergeConfig, merge
from tests.pipelines.checkpoints.digest_definition import blake2, described, small_files
from tests.tiny_models import save_tiny_llama

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
BLOCK = 16


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Any:
    """Blocks of 16 elements, read five at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.checkpoints.digests.BLOCK_ELEMENTS", BLOCK)
        patch.setattr("pipelines.checkpoints.digests.READ_ELEMENTS", 5)
        patch.setattr("pipelines.merge.plan.PIECE_ELEMENTS", 2 * BLOCK)
        patch.setattr("pipelines.merge.tensor.CHUNK_ELEMENTS", 11)
        yield


def save(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 1 << 30) -> Checkpoint:
    """Tensors in files of at most so many bytes, in the order given."""
    folder.mkdir(parents=True)
    layout = plan_layout(
        {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, max_shard_bytes
    )
    layout.create(folder)
    for name, values in tensors.items():
        layout.write(folder, name, 0, values)
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Tensor]:
    """One to five tensors of any dtype and shape, scalars and empty ones among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    tensors = {}
    for name in draw(st.lists(st.text("ab.", min_size=1), min_size=1, max_size=5, unique=True)):
        shape = draw(st.lists(st.integers(0, 9), max_size=3))
        values = torch.randint(0, 200, shape, generator=generator)
        tensors[name] = values.to(draw(st.sampled_from(DTYPES)))
    return tensors


@settings(deadline=None, max_examples=50)
@given(tensors=models(), limit=st.integers(1, 400), seed=st.randoms())
def test_the_digest_is_of_the_tensors_whatever_the_files(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], limit: int, seed: Any
) -> None:
    folder = tmp_path_factory.mktemp("model")
    expected = blake2(described(tensors, BLOCK))
    assert model_digest(save(folder / "one", tensors)).weights == expected
    names = list(tensors)
    seed.shuffle(names)
    sharded = save(folder / "sharded", {name: tensors[name] for name in names}, limit)
    (sharded.path / "README.md").write_text("a file beside it")
    assert model_digest(sharded).weights == expected


@settings(deadline=None, max_examples=50)
@given(tensors=models(), data=st.data())
def test_a_changed_bit_name_dtype_or_shape_is_another_digest(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("model")
    before = model_digest(save(folder / "before", tensors)).weights
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    changes = {"name": {name + "x": tensor}, "shape": {name: tensor.unsqueeze(0)}}
    if tensor.dtype.itemsize == 2:  # the same bytes, read otherwise
        other = torch.float16 if tensor.dtype == torch.bfloat16 else torch.bfloat16
        changes["dtype"] = {name: tensor.view(other)}
    if tensor.numel():
        flipped = tensor.clone()
        raw = flipped.view(-1).view(torch.uint8)
        raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
        changes["bit"] = {name: flipped}
    for what, changed in changes.items():
        after = save(folder / what, tensors | changed)
        assert model_digest(after).weights != before, what
        assert changed_parts(after, {"weights": before, "companions": ""})[0] == "weights"


@settings(deadline=None)
@given(size=st.integers(0, 60), step=st.integers(1, 25), first=st.integers(0, 3))
def test_digests_do_not_depend_on_the_steps_of_reading(size: int, step: int, first: int) -> None:
    values = torch.arange(size, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.checkpoints.digests.BLOCK_ELEMENTS", 16)
        whole, parts = BlockDigests(size), BlockDigests(size)
        whole.update(0, values)
        for start in range(first * 16, size, step):
            parts.update(start, values[start : start + step])
        expected = {b: d for b, d in whole.finished().items() if b >= first * 16}
    assert len(whole.finished()) == -(-size // 16)
    assert parts.finished() == expected


def test_a_block_that_was_not_wholly_seen_has_no_digest() -> None:
    digests = BlockDigests(10)
    digests.update(1, torch.ones(9))
    assert digests.finished() == {}
    digests.update(0, torch.ones(9))
    assert digests.finished() == {}


def test_companions_are_all_files_that_travel(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "model", {"a": torch.ones(3)}, 1)
    folder = checkpoint.path
    (folder / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "merges.txt", "model.py", "1_Pooling/config.json"):
        (folder / name).write_text(name)
    for name in ("README.md", "poise.json", "model.safetensors.index.json", ".x.json", "a.bin"):
        (folder / name).write_text(name)
    names = ["1_Pooling/config.json", "config.json", "merges.txt", "model.py", "tokenizer.json"]
    assert list(companions_of(folder).files) == names
    before = model_digest(checkpoint)
    assert before.companions == blake2(small_files(folder, names))
    (folder / "poise.json").write_text("changed")
    assert model_digest(checkpoint) == before
    for name in names:
        (folder / name).write_text("changed")
        after = model_digest(checkpoint)
        assert after.weights == before.weights
        assert after.companions != before.companions
        before = after


def test_what_was_known_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.arange(40), "b": torch.ones(7)}
    checkpoint = save(tmp_path / "model", tensors)
    expected = model_digest(checkpoint)
    blocks = {name: dict(entry[2]) for name, entry in described(tensors, BLOCK).items()}
    read: list[str] = []
    plain = Checkpoint.read

    def counting(self: Checkpoint, name: str, start: int, stop: int) -> Tensor:
        read.append(name)
        return plain(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "read", counting)
    assert model_digest(checkpoint, blocks) == expected
    assert read == []
    del blocks["a"][BLOCK]
    assert model_digest(checkpoint, blocks) == expected
    assert set(read) == {"a"}


def files_of(checkpoint: Checkpoint) -> list[Path]:
    return sorted({tensor.file for tensor in checkpoint.tensors.values()})


@pytest.mark.parametrize("shard_bytes", [1 << 30, 5_000])
def test_a_merge_records_the_digest_of_what_it_wrote(tmp_path: Path, shard_bytes: int) -> None:
    """It is taken from ranges in the order in which workers happen to write them."""
    inputs = [save_tiny_llama(tmp_path / f"m{i}", seed=i) for i in range(2)]
    config = {
        "merge_method": "linear",
        "models": [{"model": str(path)} for path in inputs],
        "max_shard_bytes": shard_bytes,
        "num_workers": 3,
    }
    out = Path(merge(MergeConfig.model_validate(config), tmp_path / "out"))
    record = json.loads((out / "poise.json").read_text())
    written = {}
    for file in out.glob("*.safetensors"):
        written |= load_file(file)
    assert record["weights"] == blake2(described(written, BLOCK))
    for path in inputs:
        tensors = load_file(path / "model.safetensors")
        assert record["inputs"][str(path)]["weights"] == blake2(described(tensors, BLOCK))
    names = list(companions_of(out).files)
    assert record["companions"] == blake2(small_files(out, names))


def test_records_of_earlier_versions_have_one_digest_of_both(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(40)}
    checkpoint = save(tmp_path / "model", tensors)
    (checkpoint.path / "merges.txt").write_text("was not looked at then")
    recorded = blake2([described(tensors, BLOCK), small_files(checkpoint.path, ["config.json"])])
    assert changed_parts(checkpoint, recorded) == []
    (checkpoint.path / "config.json").write_text('{"changed": 1}')
    assert changed_parts(checkpoint, recorded) == ["weights or companions"]


def test_identity_sees_every_file(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "model", {"a": torch.ones(3), "b": torch.ones(3)}, 1)
    before = identity(checkpoint)
    assert len(before) == 3
    for file in (*files_of(checkpoint), checkpoint.path / "config.json"):
        os.utime(file, ns=(1, 1))
        assert identity(checkpoint) != before
        before = identity(checkpoint)
    (checkpoint.path / "tokenizer.json").write_text("{}")
    assert identity(checkpoint) != before
