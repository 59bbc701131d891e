"""What stands beside trained models. Oracle: the digests' definition, and the card's own config."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train_export import unfinished
from torch import Tensor
from training_files import align_config

from operators.optim import ShardLayout
from pipelines.config import load_config
from pipelines.errors import InputError
from pipelines.fingerprint import MEANING
from pipelines.merge.verify import verify
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.export import export_model
from pipelines.train.export_run import export_checkpoint
from pipelines.train.run import _commit, _finished, _unfinished_run
from ray_jobs import cli
from tests.pipelines.checkpoints.digest_definition import blake2, described

WEIGHTS = "model.safetensors"


def weights_by_definition(model: Path, block: int = 1 << 22) -> str:
    return blake2(described(load_file(model / WEIGHTS), block))


def finish(config: AlignConfig, out: Path) -> None:
    """A run in this process from beginning to end."""
    unfinished(config, out)
    _commit(config, plan_alignment(config, out.parent / "cache"), out, force=False)


def test_an_aligned_model_has_record_and_card(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    config, out = align_config(tiny_llama, preferences, seed=3), tmp_path / "out"
    finish(config, out)
    record = json.loads((out / "poise.json").read_text())
    assert record["kind"] == "aligned"
    assert record["seed"] == 3
    assert record["weights"] == weights_by_definition(out)
    assert record["fingerprint"] == plan_alignment(config, tmp_path / "cache").fingerprint
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "base_model": [str(tiny_llama)],
        "library_name": "transformers",
        "tags": ["dpo", "poise"],
    }
    for fact in ("dpo", "adamw", str(preferences), "6 of 8 rows", record["weights"], "torch 2."):
        assert fact in card
    again = tmp_path / "again.yaml"
    again.write_text(card.split("```yaml\n")[1].split("```")[0])
    assert load_config(again, AlignConfig) == config
    assert verify(out).output == "same"
    assert _finished(out, plan_alignment(config, tmp_path / "cache"))


def test_an_export_has_them_too(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    config = align_config(tiny_llama, preferences)
    folder = unfinished(config, tmp_path / "run")
    out = export_checkpoint(tmp_path / "run", tmp_path / "out", step=4)
    record = json.loads((out / "poise.json").read_text())
    assert record["kind"] == "exported"
    assert record["weights"] == weights_by_definition(out)
    assert (
        record["fingerprint_of_run"] == json.loads((folder / "run.json").read_text())["fingerprint"]
    )
    assert "steps: 4 of 8 rows" in (out / "README.md").read_text()
    monkeypatch.setattr(sys, "argv", ["poise", "verify", str(out), "--again"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capfd.readouterr().err == (
        f"poise: {out}: found an exported model; allowed with --again: merged, extracted\n"
    )


class Shuffled:
    """An owner that gives a model's tensors in pieces, in an order of its own."""

    parameter_names: frozenset[str]
    tied_names: dict[str, list[str]]

    def __init__(self, tensors: dict[str, Tensor], piece: int) -> None:
        self._tensors, self._piece = tensors, piece
        self.parameter_names, self.tied_names = frozenset(list(tensors)[2:]), {}

    def owned(self) -> Iterable[tuple[ShardLayout, Tensor]]:
        for name in sorted(self.parameter_names, reverse=True):
            flat = self._tensors[name].view(-1)
            for start in range(0, flat.numel(), self._piece):
                values = flat[start : start + self._piece]
                shape = tuple(self._tensors[name].shape)
                yield ShardLayout(name, shape, start, len(values)), values


@pytest.mark.parametrize("piece", [5, 16, 1 << 20])
def test_the_digest_is_taken_while_pieces_are_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr("pipelines.checkpoints.digests.BLOCK_ELEMENTS", 16)
    read: list[str] = []
    monkeypatch.setattr(
        "pipelines.checkpoints.digests.tensor_digests", lambda checkpoint, name: read.append(name)
    )
    tensors = {name: values + 1 for name, values in load_file(tiny_llama / WEIGHTS).items()}
    saved = export_model(Shuffled(tensors, piece), tiny_llama, tmp_path / "out")
    assert saved is not None
    assert saved.digest.weights == weights_by_definition(tmp_path / "out", block=16)
    assert read == []
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(written["model.norm.weight"], tensors["model.norm.weight"])


def test_a_raised_meaning_does_not_pass_for_finished(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a finished run nor an unfinished one."""
    config, out = align_config(tiny_llama, preferences, num_steps=1), tmp_path / "out"
    finish(config, out)
    before = plan_alignment(config, tmp_path / "cache").fingerprint
    unfinished(config, tmp_path / "run")
    monkeypatch.setitem(MEANING, "align", 2)
    after = plan_alignment(config, tmp_path / "cache")
    assert not _finished(out, after)
    with (
        pytest.raises(InputError, match="holds an unfinished run of another config"),
        _unfinished_run(tmp_path / ".run.partial", after, force=False),
    ):
        pass
    monkeypatch.setitem(MEANING, "align", 1)
    assert plan_alignment(config, tmp_path / "cache").fingerprint == before
