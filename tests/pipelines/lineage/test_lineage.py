"""`poise lineage`: what weights are, from records alone.

Oracle: a family of models whose merges are real and whose ancestors are known by how it was made.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import model_digest
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint_directory
from pipelines.lineage import Archive, Lineage, lineage
from pipelines.merge import MergeConfig, merge
from pipelines.provenance import Provenance
from tests.ray_jobs.command_line import poise
from tests.tiny_models import save_tiny_llama

RECORD, WEIGHTS = "poise.json", "model.safetensors"


def weights_of(folder: Path) -> str:
    return model_digest(Checkpoint.open(folder)).weights


def record_training(folder: Path, start: Path, **config: Any) -> None:
    """The record that a training from `start` leaves, as far as it tells of ancestors."""
    settings = {
        "model": str(start),
        "data": "pairs.jsonl",
        "objective": {"name": "dpo"},
        "optimizer": {"name": "adamw"},
        "num_steps": 7,
        "global_batch_size": 4,
    }
    Provenance(
        kind="aligned",
        digest=model_digest(Checkpoint.open(folder)),
        fingerprint=f"{folder.name:0<32}",
        config=settings | config,
        inputs={
            "model": fingerprint_directory(start, ("*.safetensors", "*.json")),
            "data": "d" * 32,
        },
        seed=3,
        title="",
        base_models=[],
        summary="",
    ).write(folder)


def merged(out: Path, base: Path, *models: Path, weight: float = 0.5) -> Path:
    """A real merge by task arithmetic."""
    config = {
        "merge_method": "task_arithmetic",
        "executor": "local",
        "base_model": str(base),
        "models": [{"model": str(path)} for path in models],
        "parameters": {"weight": weight},
    }
    return merge(MergeConfig.model_validate(config), out)


def record_evaluation(folder: Path, models: Mapping[str, str], samples: Mapping[str, str]) -> None:
    """A store: finished numbers of some models, and samples of some."""
    number = {"value": 51.25, "stderr": 1.5}
    entries = {
        name: {"digest": digest, "groups": {"truth": number}, "tasks": {"facts": {}}}
        for name, digest in models.items()
    }
    folder.mkdir(parents=True)
    (folder / "store.json").write_text("{}")
    if models:
        content = {"schema": 2, "split": "test", "models": entries}
        (folder / "evaluation.json").write_text(json.dumps(content))
    for name, digest in samples.items():
        cell = folder / "samples" / "facts" / name
        cell.mkdir(parents=True)
        said = {"model": name, "digest": {"weights": digest}, "task": "facts", "split": "test"}
        (cell / "cell.json").write_text(json.dumps(said))


@dataclass(frozen=True)
class Family:
    """base -> (helpful, honest) -> merge -> again; the base has no record."""

    root: Path
    base: Path
    helpful: Path
    honest: Path
    merge: Path
    again: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    names = ("base", "helpful", "honest")
    base, helpful, honest = (save_tiny_llama(root / n, seed) for seed, n in enumerate(names))
    for tuned in (helpful, honest):
        record_training(tuned, base)
    out = merged(root / "out" / "merge", base, helpful, honest)
    again = merged(root / "out" / "again", base, out, weight=0.3)
    record_evaluation(root / "runs" / "test", {"mix": weights_of(out)}, {"mix": weights_of(out)})
    record_evaluation(root / "runs" / "begun", {}, {"first": weights_of(again)})
    return Family(root, base, helpful, honest, out, again)


@pytest.fixture
def family(made: Family, tmp_path: Path) -> Family:
    """A copy that a test may spoil; its records name the paths of the first one."""
    root = Path(shutil.copytree(made.root, tmp_path / "family"))
    for record in root.rglob(RECORD):
        record.write_text(record.read_text().replace(str(made.root), str(root)))
    places = {name: root / path.relative_to(made.root) for name, path in vars(made).items()}
    return Family(**places)


def traced(root: Path, weights: str) -> Lineage:
    archive = Archive()
    archive.add(root)
    return lineage(archive, weights)


def parents_of(found: Lineage, weights: str) -> list[tuple[str, str | None]]:
    [making] = found.models[weights].makings
    return [(each.role, each.weights) for each in making.parents]


def change(folder: Path) -> None:
    """Other weights in the files of a model."""
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_merge_of_a_merge_leads_to_the_trainings_and_their_start(made: Family) -> None:
    of = {name: weights_of(getattr(made, name)) for name in vars(made) if name != "root"}
    found = traced(made.root, of["again"])
    assert parents_of(found, of["again"]) == [("model", of["merge"]), ("base", of["base"])]
    assert parents_of(found, of["merge"]) == [
        ("model", of["helpful"]),
        ("model", of["honest"]),
        ("base", of["base"]),
    ]
    assert {*found.models} == set(of.values())
    assert found.models[of["base"]].makings == []
    [training] = found.models[of["helpful"]].makings
    assert training.told == "trained by dpo with adamw, 7 steps of 4 rows, seed 3"
    assert training.data == [f"pairs.jsonl ({'d' * 32})"]
    assert not found.contradictions
    assert traced(made.root, of["merge"]).used_by == [made.again]
    assert set(traced(made.root, of["base"]).used_by) == {made.again, made.merge}


def test_evaluations_with_numbers_and_those_that_only_began(made: Family) -> None:
    found = traced(made.root, weights_of(made.again))
    [begun] = found.models[weights_of(made.again)].measured
    assert (begun.name, begun.groups, begun.tasks) == ("first", {}, ["facts"])
    [finished] = found.models[weights_of(made.merge)].measured
    assert finished.groups == {"truth": {"value": 51.25, "stderr": 1.5}}


def test_a_training_is_led_to_its_start_by_the_bytes_of_the_files(family: Family) -> None:
    """Recorded start: found at its path, after it was moved, and not when it is another."""
    record_training(family.base, family.root / "runs", init="random")
    record_training(family.helpful, family.base)
    helpful, base = weights_of(family.helpful), weights_of(family.base)
    assert parents_of(traced(family.root, helpful), helpful) == [("model", base)]
    assert parents_of(traced(family.root, base), base) == []  # of a folder with a config alone
    moved = Path(shutil.move(family.base, family.root / "out" / "base"))
    assert parents_of(traced(family.root, helpful), helpful) == [("model", base)]
    shutil.move(moved, family.base)
    (family.base / "generation_config.json").write_text("{}")
    found = traced(family.root, helpful)
    assert parents_of(found, helpful) == [("model", None)]
    [line] = found.contradictions
    assert f"{family.helpful} was trained from {family.base} with files of the fingerprint" in line


def test_the_command_prints_a_tree(made: Family, monkeypatch, capsys) -> None:
    weights = weights_of(made.merge)
    assert poise(monkeypatch, "lineage", weights[:9].upper(), "--in", made.root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{weights}  merged by task_arithmetic, weight 0.5, seed 0"
    assert lines[1:4] == [
        f"│  in {made.merge}",
        f"│  evaluated in {made.root}/runs/test as mix (test): truth 51.25 ±1.5",
        f"│  used by {made.again}",
    ]
    assert lines[4].startswith(f"├─ model {weights_of(made.helpful)[:12]}  trained by dpo")
    assert lines[-1].startswith(f"└─ base {made.base}, of which no record is here")


def test_the_command_reads_a_folder_and_prints_json(made: Family, monkeypatch, capsys) -> None:
    assert poise(monkeypatch, "lineage", made.merge, "--in", made.root / "runs", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    weights = weights_of(made.merge)
    assert found["weights"] == weights and found["contradictions"] == []
    assert found["models"][weights]["makings"][0]["kind"] == "merged"
    assert found["models"][weights]["measured"][0]["name"] == "mix"
    assert found["searched"] == "4 folders, 1 record, 2 evaluations"


def test_copies_are_one_model_and_two_ways_are_two(family: Family) -> None:
    shutil.copytree(family.merge, family.root / "copy")
    other = shutil.copytree(family.merge, family.root / "way")
    record = json.loads((other / RECORD).read_text())
    (other / RECORD).write_text(json.dumps(record | {"kind": "dreamt", "fingerprint": "f" * 32}))
    weights = weights_of(family.merge)
    first, second = traced(family.root, weights).models[weights].makings
    assert first.folders == [family.root / "copy", family.merge]
    assert (second.kind, second.told) == ("dreamt", "dreamt, seed 0")


def test_a_folder_whose_weights_are_not_those_of_its_record(
    family: Family, monkeypatch, capsys
) -> None:
    recorded = weights_of(family.merge)
    change(family.merge)
    assert poise(monkeypatch, "lineage", family.merge, "--in", family.root) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{weights_of(family.merge)}  no record of how it was made")
    assert out.splitlines()[-1].endswith(f"its poise.json tells of {recorded}")


def test_records_that_contradict_each_other_are_named(family: Family) -> None:
    record = json.loads((family.merge / RECORD).read_text())
    wrong = shutil.copytree(family.merge, family.root / "wrong")
    (wrong / RECORD).write_text(json.dumps(record | {"weights": "e" * 32}))
    [line] = traced(family.root, weights_of(family.merge)).contradictions
    assert "are of one config and inputs" in line and "e" * 32 in line
    shutil.rmtree(wrong)
    honest = json.loads((family.honest / RECORD).read_text())
    (family.honest / RECORD).write_text(json.dumps(honest | {"weights": "a" * 32}))
    [line] = traced(family.root, weights_of(family.merge)).contradictions
    assert line.startswith(f"{family.merge} was made from {family.honest} with the weights ")
    assert line.endswith(f"the record there is of {'a' * 32}")


def test_records_in_a_circle_come_to_an_end(family: Family, monkeypatch, capsys) -> None:
    first, second = weights_of(family.merge), weights_of(family.again)
    record = json.loads((family.merge / RECORD).read_text())
    record["inputs"][str(family.again)] = {"weights": second, "companions": "c" * 32}
    (family.merge / RECORD).write_text(json.dumps(record))
    assert poise(monkeypatch, "lineage", first, "--in", family.root) == 0
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if "were made from themselves" in line]
    assert line.endswith(
        (f"{first} from {second} from {first}", f"{second} from {first} from {second}")
    )
    assert "(see above)" in out


def test_links_that_lead_back(family: Family) -> None:
    (family.root / "out" / "back").symlink_to(family.root)
    (family.root / "self").symlink_to(family.root / "self")
    (family.root / "elsewhere").symlink_to(family.root.parent / "nothing")
    other = family.root.parent / "linked"
    shutil.move(family.merge, other)
    family.merge.symlink_to(other)
    weights = weights_of(family.merge)
    found = traced(family.root, weights)
    assert found.models[weights].makings[0].folders == [family.merge]


def test_hidden_folders_are_passed_over(family: Family) -> None:
    shutil.copytree(family.merge, family.root / ".merge.partial")
    weights = weights_of(family.merge)
    [making] = traced(family.root, weights).models[weights].makings
    assert making.folders == [family.merge]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "found list, expected an object"),
        ('{"weights": 7, "companions": 7, "inputs": {}}', "not a record of this version"),
        ('{"weights": "' + "0" * 32 + '"}', "not a record of this version"),
    ],
)
def test_records_that_do_not_read_are_left_out_and_named(
    family: Family, content: str, said: str, monkeypatch, capsys
) -> None:
    (family.honest / RECORD).write_text(content)
    assert poise(monkeypatch, "lineage", family.merge, "--in", family.root) == 0
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert shown.err.startswith(f"poise lineage: left out: {family.honest / RECORD}: ")
    assert said in shown.err
    assert f"model {family.honest}, of which no record is here" in shown.out


def test_evaluations_that_do_not_read(family: Family) -> None:
    (family.root / "runs" / "test" / "evaluation.json").write_text('{"schema": 1}')
    [cell] = (family.root / "runs" / "begun").rglob("cell.json")
    cell.write_text("{}")
    archive = Archive()
    archive.add(family.root)
    assert len(archive.remarks) == 2
    assert all("not a record of this version" in line for line in archive.remarks)


@pytest.mark.parametrize("text", ["abc", "xyz12", "a" * 33, "", "../merge"])
def test_what_is_no_digest(made: Family, text: str, monkeypatch, capsys) -> None:
    assert poise(monkeypatch, "lineage", text, "--in", made.root) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert f"DIGEST: found {text!r}; allowed: " in shown.err


def test_an_unknown_digest_gets_the_nearest_and_what_was_searched(made: Family) -> None:
    archive = Archive()
    archive.add(made.root)
    weights = weights_of(made.merge)
    typed = weights[:5] + ("0" if weights[5] != "0" else "1") + weights[6:]
    with pytest.raises(InputError) as caught:
        archive.digest_of(typed)
    line = str(caught.value)
    assert line.startswith(f"DIGEST: nothing is known of {typed}; searched: ")
    assert "4 records, 2 evaluations; nearest: " + weights in line
    assert f"({made.merge})" in line


def test_a_beginning_of_several_digests(tmp_path: Path) -> None:
    for name, digit in (("one", "1"), ("two", "2")):
        folder = tmp_path / name
        folder.mkdir()
        record = {"kind": "merged", "weights": "abcd" + digit * 28, "companions": "", "inputs": {}}
        (folder / RECORD).write_text(json.dumps(record))
    archive = Archive()
    archive.add(tmp_path)
    with pytest.raises(InputError, match=r"abcd begins 2 digests: abcd1+ .*one\), abcd2"):
        archive.digest_of("abcd")
    assert archive.digest_of("abcd2") == "abcd" + "2" * 28


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch, capsys) -> None:
    assert poise(monkeypatch, "lineage", "abcd", "--in", tmp_path / "absent") == 2
    assert capsys.readouterr().err == f"poise: --in {tmp_path}/absent: no such folder\n"


def test_records_of_the_first_version(tmp_path: Path) -> None:
    """They have one digest, `output`, and the key instead of the fingerprint."""
    folder = tmp_path / "old"
    folder.mkdir()
    old = {"kind": "merge", "key": "k" * 32, "output": "0" * 32, "inputs": {"x": "1" * 32}}
    (folder / RECORD).write_text(json.dumps(old))
    found = traced(tmp_path, "0" * 32)
    [making] = found.models["0" * 32].makings
    assert (making.kind, making.told) == ("merged", "merged by several methods")
    assert [(each.name, each.weights) for each in making.parents] == [("x", None)]


def test_a_long_chain(tmp_path: Path) -> None:
    """Longer than Python's stack."""
    digests = [f"{number:032x}" for number in range(1200)]
    for number, digest in enumerate(digests):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        inputs = {"x": {"weights": digests[number - 1]}} if number else {}
        record = {"kind": "merged", "weights": digest, "companions": "", "inputs": inputs}
        (folder / RECORD).write_text(json.dumps(record | {"fingerprint": digest}))
    assert len(traced(tmp_path, digests[-1]).models) == 1200
