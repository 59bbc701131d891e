"""A checkpoint that may not answer is refused in one line, by whatever is wrong with it.

Oracle: checkpoints with exactly one defect each, made by hand; digests by `model_digest`.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import model_digest
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge
from pipelines.serve.validation import validated
from tests.tiny_models import save_tiny_gpt2, save_tiny_llama

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def shards(model: Path) -> Path:
    """The same model in several files."""
    folder = model.parent / "shards"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = AutoModelForCausalLM.from_pretrained(model)
    whole.save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda source: Path(shutil.copytree(source, tmp_path / "copy"))


def tensors_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change the tensors of a checkpoint in one file."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def refused(folder: Path) -> str:
    """The line by which a checkpoint is refused."""
    with pytest.raises(InputError) as caught:
        validated(folder)
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line
    return line


def test_good_ones_pass_with_the_digest_of_their_weights(model: Path, shards: Path) -> None:
    one, many = validated(model), validated(shards)
    assert one.weights == many.weights == model_digest(Checkpoint.open(model)).weights
    assert one.num_bytes == sum(4 * each.numel() for each in load_file(model / FILE).values())
    assert len({tensor.file for tensor in many.checkpoint.tensors.values()}) > 2


def test_tied_heads_and_other_layouts_pass(tmp_path: Path) -> None:
    for folder in (save_tiny_llama(tmp_path / "a", tied=True), save_tiny_gpt2(tmp_path / "b")):
        assert validated(folder).weights == model_digest(Checkpoint.open(folder)).weights


def test_the_model_is_asked_last(model: Path) -> None:
    asked: list[Path] = []
    validated(model, probe=asked.append)
    assert asked == [model]

    def silent(path: Path) -> None:
        raise InputError(f"model {path}: answers nothing")

    with pytest.raises(InputError, match="answers nothing"):
        validated(model, probe=silent)


@settings(max_examples=20, deadline=None)
@given(kept=st.integers(0, 100_000))
def test_every_truncation_is_noticed(model: Path, kept: int) -> None:
    folder = model.parent / "truncated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    data = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: kept % len(data)])
    assert FILE in refused(folder)


def test_a_header_that_is_damaged(model: Path, copy) -> None:
    folder = copy(model)
    data = bytearray((folder / FILE).read_bytes())
    data[8:20] = b"x" * 12
    (folder / FILE).write_bytes(data)
    assert refused(folder).endswith("its safetensors header is damaged")


def test_bytes_after_the_last_tensor(model: Path, copy) -> None:
    folder = copy(model)
    with (folder / FILE).open("ab") as file:
        file.write(b"more")
    assert f"{FILE}: cannot be read" in refused(folder)


def test_tensors_that_overlap(model: Path, copy) -> None:
    folder = copy(model)
    data = (folder / FILE).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    layer = "model.layers.{}.input_layernorm.weight"
    header[layer.format(0)]["data_offsets"] = header[layer.format(1)]["data_offsets"]
    text = json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert f"{FILE}: cannot be read" in refused(folder)


def test_a_missing_shard(shards: Path, copy) -> None:
    folder = copy(shards)
    name = sorted(folder.glob("*.safetensors"))[1].name
    (folder / name).unlink()
    assert refused(folder) == f"model {folder}: {INDEX} names {name}, which is missing"


def test_an_index_that_tells_of_other_places(shards: Path, copy) -> None:
    folder = copy(shards)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM], index["weight_map"][HEAD] = (
        index["weight_map"]["model.embed_tokens.weight"],
        index["weight_map"][HEAD],
    )
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{INDEX}: {NORM}: found " in refused(folder)


def test_a_tensor_in_two_shards(shards: Path, copy) -> None:
    folder = copy(shards)
    first, *_, last = sorted(folder.glob("*.safetensors"))
    save_file({**load_file(last), **load_file(first)}, last, metadata={"format": "pt"})
    assert "is in 2 of its files; allowed: in one" in refused(folder)


def test_shapes_that_the_config_does_not_have(model: Path, copy) -> None:
    folder = tensors_of(copy(model), lambda t: t.update({NORM: torch.ones(33)}))
    line = refused(folder)
    assert line == f"model {folder}: {NORM}: found shape [33]; allowed: [32], as config.json has it"


def test_a_tensor_too_few_and_one_too_many(model: Path, tmp_path: Path) -> None:
    few = Path(shutil.copytree(model, tmp_path / "few"))
    tensors_of(few, lambda tensors: tensors.pop(NORM))
    assert refused(few) == f"model {few}: lacks {NORM}, by config.json's LlamaForCausalLM"
    many = Path(shutil.copytree(model, tmp_path / "many"))
    tensors_of(many, lambda tensors: tensors.update(extra=torch.ones(2)))
    assert refused(many).endswith("has no place for extra, by config.json's LlamaForCausalLM")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_single_value_that_is_no_number(model: Path, copy, value: float) -> None:
    """In the last element, which no other check reads."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD].view(-1)[-1] = value

    folder = tensors_of(copy(model), spoil)
    line = refused(folder)
    assert line == f"model {folder}: {HEAD}: holds NaN or Inf; allowed: finite numbers"


def test_values_are_looked_at_in_every_range(model: Path, copy, monkeypatch) -> None:
    """Ranges of five elements: of NaN after zeros, which might have been a mask."""
    monkeypatch.setattr("pipelines.serve.validation.READ_ELEMENTS", 5)
    monkeypatch.setattr("pipelines.checkpoints.digests.BLOCK_ELEMENTS", 10)
    assert validated(model).weights == model_digest(Checkpoint.open(model)).weights

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM].zero_()
        tensors[NORM][:2] = -torch.inf
        tensors[NORM][12] = 1.0

    folder = tensors_of(copy(model), spoil)
    assert f"{NORM}: holds NaN or Inf" in refused(folder)


def test_dtypes_that_an_engine_would_round(model: Path, tmp_path: Path) -> None:
    double = Path(shutil.copytree(model, tmp_path / "double"))
    tensors_of(double, lambda tensors: tensors.update({NORM: tensors[NORM].double()}))
    assert f"{NORM}: found torch.float64; allowed: float32, bfloat16" in refused(double)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert refused(other).endswith(
        "config.json: dtype: found bfloat16; allowed: float32, as its tensors are"
    )


def test_weights_that_the_record_does_not_describe(model: Path, tmp_path: Path) -> None:
    config = {"merge_method": "linear", "executor": "local"}
    config |= {"models": [{"model": str(model), "parameters": {"weight": 1.0}}]}
    out = merge(MergeConfig.model_validate(config), tmp_path / "merged")
    before = validated(out).weights

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM][3] += 1

    tensors_of(out, change)
    line = refused(out)
    assert line.endswith(f"its poise.json describes {before}")
    assert line.startswith(f"model {out}: found weights ")


def test_a_class_that_nobody_knows_and_one_of_another_kind(model: Path, tmp_path: Path) -> None:
    for name, said in (
        ("NoSuchForCausalLM", "found NoSuchForCausalLM; allowed: a causal language model"),
        ("BertModel", "found BertModel; allowed: a causal language model"),
    ):
        folder = Path(shutil.copytree(model, tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        assert said in refused(folder)
    with pytest.raises(InputError, match="found LlamaForCausalLM; allowed: a sequence class"):
        validated(model, kind="reward")


def test_tokens_without_a_row_and_no_tokenizer(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "tokens"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["one more"] = 99
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer gives token 99; its vocabulary has 47 tokens" in refused(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "its tokenizer does not load" in refused(folder)


def test_files_that_change_meanwhile(model: Path, copy) -> None:
    folder = copy(model)
    with pytest.raises(InputError, match="its files changed while they were read; try again"):
        validated(folder, probe=lambda path: os.utime(path / FILE, ns=(1, 1)))


def test_what_is_no_checkpoint(model: Path, copy, tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "absent")
    folder = copy(model)
    (folder / FILE).rename(folder / "pytorch_model.bin")
    assert "found pytorch_model.bin, a pickle" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in refused(folder)
