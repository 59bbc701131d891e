"""Records, cards, and what passes for finished. Oracle: records of schema 1, written by hand."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipelines.errors import InputError
from pipelines.fingerprint import MEANING, fingerprint, fingerprint_work
from pipelines.merge import MergeConfig, merge
from pipelines.merge.verify import verify
from pipelines.merge.worker import MergeWorker
from pipelines.provenance import read_record
from ray_jobs import cli
from tests.pipelines.checkpoints.digest_definition import blake2, described, small_files
from tests.tiny_models import save_tiny_llama

COMPANIONS = ["chat_template.jinja", "config.json", "generation_config.json"]
COMPANIONS += ["tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return [save_tiny_llama(tmp_path / f"m{i}", seed=i) for i in range(2)]


def config_of(inputs: list[Path], **fields: Any) -> MergeConfig:
    models = [{"model": str(path)} for path in inputs]
    return MergeConfig.model_validate({"merge_method": "linear", "models": models} | fields)


def in_schema_1(folder: Path, inputs: list[Path]) -> None:
    """Put the record in place that version 0.1 would have written."""

    def content(path: Path) -> str:
        names = [name for name in COMPANIONS if (path / name).is_file()]
        tensors = described(load_file(path / "model.safetensors"))
        return blake2([tensors, small_files(path, names)])

    record = json.loads((folder / "poise.json").read_text())
    identities = {}
    for path in inputs:
        names = [name for name in [*COMPANIONS, "model.safetensors"] if (path / name).is_file()]
        stats = {name: (path / name).stat() for name in names}
        identities[str(path)] = {n: [s.st_size, s.st_mtime_ns] for n, s in stats.items()}
    old = {
        "kind": "merge",
        "config": record["config"],
        "inputs": {str(path): content(path) for path in inputs},
        "output": content(folder),
        "seed": record["seed"],
        "drawn": {},
        "settings": blake2(record["config"]),
        "key": blake2([record["config"], identities]),
        "versions": record["versions"],
    }
    (folder / "poise.json").write_text(json.dumps(old))


@pytest.mark.parametrize("touched", [False, True])
def test_a_finished_merge_of_version_1_is_recognised(
    inputs: list[Path], tmp_path: Path, touched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its files' times, and where those changed, by what they hold."""
    config, out = config_of(inputs), tmp_path / "out"
    merge(config, out)
    in_schema_1(out, inputs)
    if touched:
        os.utime(inputs[0] / "model.safetensors", ns=(1, 1))
    monkeypatch.delattr("pipelines.merge.run._fill")
    assert merge(config, out) == out
    found = verify(out)
    assert (found.output, set(found.inputs.values())) == ("same", {"same"})


def test_what_changed_is_told_apart(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    out = Path(merge(config_of(inputs), tmp_path / "out"))
    assert verify(out, again=True).again is True
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    found = verify(out)
    assert (found.output, found.changed) == ("changed", ["companions"])
    monkeypatch.setattr(sys, "argv", ["poise", "verify", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "its companions are not those that its record describes" in capfd.readouterr().err
    in_schema_1(out, inputs)
    record = json.loads((out / "poise.json").read_text())
    assert verify(out).changed == []
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    assert verify(out).changed == ["weights or companions"]
    (out / "poise.json").write_text(json.dumps({**record, "output": None}))
    monkeypatch.setattr(sys, "argv", ["poise", "verify", str(out)])
    with pytest.raises(SystemExit):
        cli.main()
    assert capfd.readouterr().err == f"poise: {out / 'poise.json'}: has no digest of the weights\n"


def test_a_raised_meaning_does_the_work_again(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished merge, a touched one too, no longer passes; then the new one does."""
    config, out = config_of(inputs), tmp_path / "out"
    merge(config, out)
    monkeypatch.setitem(MEANING, "merge", 2)
    with pytest.raises(InputError, match="exists already"):
        merge(config, out)
    os.utime(inputs[0] / "model.safetensors", ns=(1, 1))
    with pytest.raises(InputError, match="exists already"):
        merge(config, out)
    before = (out / "model.safetensors").stat().st_ino
    merge(config, out, force=True)
    again = (out / "model.safetensors").stat().st_ino
    assert again != before
    merge(config, out)
    assert (out / "model.safetensors").stat().st_ino == again


def test_unfinished_work_of_another_meaning_is_not_gone_on_with(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = config_of(inputs), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*arguments: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("pipelines.merge.run.write_companions", stop)
        merge(config, out)
    done: list[int] = []
    plain = MergeWorker.run
    monkeypatch.setattr(MergeWorker, "run", lambda self, n: (done.append(n), plain(self, n))[1])
    monkeypatch.setitem(MEANING, "merge", 2)
    merge(config, out)
    assert done


def test_the_first_meaning_adds_nothing() -> None:
    value = {"a": [1, 2]}
    assert fingerprint_work(value, "merge", "sweep") == fingerprint(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MEANING, "merge", 2)
        raised = fingerprint_work(value, "merge")
        assert raised != fingerprint(value)
        assert fingerprint_work(value, "align") == fingerprint(value)
        assert fingerprint_work(value, "merge", "sweep") == raised
        patch.setitem(MEANING, "merge", 3)
        assert fingerprint_work(value, "merge") not in (raised, fingerprint(value))


def test_no_record(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
