"""Data sets of the hub: which files are fetched, that they train as a folder's, what is refused.

Oracle: the same files in a folder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import constants
from pydantic import ValidationError
from training_files import align_config, preference_rows, run_here, write_rows

from pipelines.errors import InputError
from pipelines.hub.offline import ASKED_OFFLINE
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.data.hub import bring_rows, data_folder
from pipelines.train.data.rows import parts_of, read_part, source_files
from pipelines.train.models import with_folders
from pipelines.train.run import _commit
from tests.hub_stub import Stub

ROWS = preference_rows(12)
FILE = "data/train-00000-of-00002.parquet"


def publish(hub: Stub, folder: Path, files: dict[str, Any], name: str = "org/set") -> str:
    """A data set of files, each of rows or of bytes; returns the commit."""
    for place, content in files.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        elif path.suffix in (".gz", ".zst"):
            kind = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
            with pa.CompressedOutputStream(str(path), kind) as out:
                out.write("".join(json.dumps(row) + "\n" for row in content).encode())
        else:
            write_rows(path, content)
    hub.kinds[name] = "datasets"
    return hub.add(name, folder)


@pytest.fixture
def commit(hub: Stub, tmp_path: Path) -> str:
    """A data set in Parquet, as the hub has most: two pieces, a test split, a card, other files."""
    files = {FILE: ROWS[:6], FILE.replace("00000", "00001"): ROWS[6:10]}
    others = {
        "README.md": b"card",
        "set.py": b"raise SystemExit",
        "all.pkl": b"\x80",
        "x.csv": b"a",
    }
    return publish(hub, tmp_path / "set", files | {"data/test-0.parquet": ROWS[10:]} | others)


def rows_of(folder: Path, split: str | None) -> list[Any]:
    """The rows of a folder as they are read."""
    return [row for part in parts_of(source_files(folder, split)) for _, row in read_part(part)]


def test_the_run_is_that_of_a_folder_and_its_record_names_the_commit(
    hub: Stub, commit: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Weights and fingerprint do not depend on where the files came from."""
    data = {"hub": "hf://datasets/org/set", "here": str(tmp_path / "set")}
    records, plans = {}, {}
    for name, path in data.items():
        config = with_folders(align_config(tiny_llama, Path(path), split="train", num_steps=2))
        out = tmp_path / name / "out"
        run_here(config, out.with_name(".out.partial"))
        plans[name] = plan_alignment(config, out.parent / "cache")
        _commit(config, plans[name], out, force=False)
        records[name] = json.loads((out / "poise.json").read_text())
    for field in ("weights", "fingerprint", "inputs"):
        assert records["hub"][field] == records["here"][field]
    assert records["hub"]["config"]["data"] == f"org/set@{commit}"
    assert records["hub"]["hub"] == [{"id": "org/set", "commit": commit, "kind": "dataset"}]
    assert "hub" not in records["here"]
    card = (tmp_path / "hub" / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["org/set"]
    assert sorted(hub.fetched()) == [FILE, FILE.replace("00000", "00001")]
    assert plans["hub"].table.num_rows == 10


FORMS: dict[str, Any] = {
    "train.jsonl": ROWS,
    "train.json": ROWS,
    "train.jsonl.gz": ROWS,
    "train.jsonl.zst": ROWS,
    "train/0000.parquet": ROWS,
    "main/train.jsonl": ROWS,
}


@pytest.mark.parametrize("place", FORMS)
def test_every_form_is_read_as_a_local_copy(place: str, hub: Stub, tmp_path: Path) -> None:
    """Beside a test split in another file, of which no byte is fetched."""
    test = place.replace("train", "test", 1)
    publish(hub, tmp_path / "set", {place: ROWS, test: ROWS[:1]})
    folder = data_folder(Path("org/set"), "train")
    assert rows_of(folder, "train") == rows_of(tmp_path / "set", "train") == ROWS
    assert hub.fetched() == [place]


def test_an_interrupted_download_goes_on_and_other_bytes_are_refused(
    hub: Stub, commit: str, tmp_path: Path
) -> None:
    hub.cut[FILE] = 2
    folder = data_folder(Path("org/set"), "train")
    assert (folder / FILE).read_bytes() == (tmp_path / "set" / FILE).read_bytes()
    assert any(path.endswith(FILE) and begin for _, path, begin, _ in hub.asked)
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.corrupt.add(FILE)
    with pytest.raises(InputError, match=f"^dataset org/set@?.*: {FILE}: came with hash"):
        data_folder(Path("org/set"), "train")


def test_revisions(hub: Stub, tmp_path: Path) -> None:
    """A branch in the name, or beside the path; the same commit."""
    first = publish(hub, tmp_path / "set", {"train.jsonl": ROWS})
    (tmp_path / "set" / "train.jsonl").write_text("{}\n")
    hub.add("org/set", tmp_path / "set", "other")
    for data in ("org/set@" + first, {"path": "org/set", "revision": first}, "org/set"):
        (found,) = with_folders(align_config(tmp_path, data)).sets  # type: ignore[arg-type]
        assert (found.path.name, found.title) == (first, "set")
    (other,) = with_folders(align_config(tmp_path, {"path": "org/set", "revision": "other"})).sets  # type: ignore[arg-type]
    assert rows_of(other.path, None) == [{}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "rows.jsonl.gz/", "revision": "v1"}, "has no effect on 'rows.jsonl.gz/'"),
        ({"path": "org/set@v1", "revision": "v1"}, "found 'v1' for 'org/set@v1'; allowed: one"),
        ({"path": "org/set", "revision": 3}, "found 3 for 'org/set'; allowed: one branch"),
    ],
)
def test_a_revision_that_means_nothing(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=f"revision: {message}"):
        align_config(tmp_path, data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (
            {"set.py": b"", "x.zip": b""},
            None,
            "but a loading script (set.py), which is not run; all",
        ),
        (
            {"x.csv": b"", "y.pkl": b""},
            None,
            "has no files of rows; found: .csv, .pkl; allowed: .js",
        ),
        ({"train.jsonl": ROWS, "test.jsonl": ROWS}, None, "holds test, train; choose by split"),
        ({"train.jsonl": ROWS}, "dev", "no file of split 'dev' that ends in .jsonl, "),
        (
            {
                f"{name}/{split}.jsonl": ROWS
                for name in ("easy", "hard")
                for split in ("train", "test")
            },
            "train",
            "several configurations: easy, hard; choose one by split, such as split: easy/train ",
        ),
        (
            {"easy/train.jsonl": ROWS, "easy/test.jsonl": ROWS, "hard/train.jsonl": ROWS},
            "easy",
            "holds test, train; choose by split",
        ),
        (
            {"data/train.jsonl": ROWS, "data/train.parquet": ROWS},
            "train",
            "several formats: data/train.jsonl, data/train.parquet; choose one by split, such as",
        ),
    ],
)
def test_what_cannot_be_chosen_is_one_line_before_any_download(
    files: dict[str, Any], split: str | None, message: str, hub: Stub, tmp_path: Path
) -> None:
    publish(hub, tmp_path / "set", files)
    with pytest.raises(InputError) as error:
        data_folder(Path("org/set"), split)
    assert str(error.value).startswith("dataset org/set: ") and message in str(error.value)
    assert "\n" not in str(error.value) and hub.fetched() == []


def test_a_configuration_is_chosen_by_its_path(hub: Stub, tmp_path: Path) -> None:
    files = {"easy/train.jsonl": ROWS, "easy/test.jsonl": ROWS, "hard/train.jsonl": ROWS[:2]}
    publish(hub, tmp_path / "set", files)
    assert rows_of(data_folder(Path("org/set"), "hard"), "hard") == ROWS[:2]
    data_folder(Path("org/set"), "easy/train")
    assert hub.fetched() == ["hard/train.jsonl", "easy/train.jsonl"]


def test_offline_the_cache_serves_and_what_is_missing_is_one_line(
    hub: Stub,
    commit: str,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = data_folder(Path("org/set"), "train")
    monkeypatch.setenv(ASKED_OFFLINE, "1")
    asked = len(hub.asked)
    assert data_folder(Path("org/set"), "train") == folder
    with pytest.raises(InputError) as error:
        plan_alignment(align_config(tiny_llama, Path("org/set"), split="test"))
    line = str(error.value)
    assert "\n" not in line and "not all of it (as data/test-0.parquet)" in line
    assert line.endswith("hf download org/set --repo-type dataset, or unset HF_HUB_OFFLINE")
    assert len(hub.asked) == asked


def test_a_snapshot_of_another_program_serves_if_it_is_whole(
    hub: Stub, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Poise's list of its files: pieces say how many there are."""
    folder = data_folder(Path("org/set"), "train")
    shutil.rmtree(folder.parents[1] / ".poise")
    monkeypatch.setenv(ASKED_OFFLINE, "1")
    assert data_folder(Path("org/set"), "train") == folder
    (folder / FILE).unlink()
    with pytest.raises(InputError, match="not in the hub's cache"):
        data_folder(Path("org/set"), "train")


def test_a_name_is_a_folder_where_there_is_one(
    hub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a missing file is a missing file, about which nobody is asked."""
    monkeypatch.chdir(tmp_path)
    Path("org/set").mkdir(parents=True)
    assert data_folder(Path("org/set"), None) == Path("org/set")
    assert data_folder(Path("data/rows.jsonl"), None) == Path("data/rows.jsonl")
    assert hub.asked == []


def test_a_tokenising_worker_fetches_its_files_for_itself(
    hub: Stub, commit: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """On a node with another cache: only those of its parts."""
    folder = data_folder(Path("org/set"), "train")
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.asked.clear()
    with pytest.raises(InputError, match="HF_HUB_OFFLINE says not to ask"):
        bring_rows([str(folder / FILE)], offline=True)
    bring_rows([str(folder / FILE), str(tmp_path / "no.jsonl")], offline=False)
    assert hub.fetched() == [FILE] and (folder / FILE).is_file()


def test_several_sets_keep_their_names(
    hub: Stub, commit: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Titles are the sets' own, so that shares are drawn as from folders of these names."""
    publish(hub, tmp_path / "more", {"train.jsonl": ROWS}, "org/more")
    tables = []
    for root in ("org", str(tmp_path)):
        sets = [{"path": f"{root}/set", "split": "train", "share": 0.5}, {"path": f"{root}/more"}]
        config = AlignConfig.model_validate(
            align_config(tiny_llama, sets).model_dump()  # type: ignore[arg-type]
        )
        tables.append(plan_alignment(config, tmp_path / "cache"))
    assert [each.name for each in tables[0].table.sets] == ["set", "more"]
    assert tables[0].data_key == tables[1].data_key
    assert tables[0].fingerprint == tables[1].fingerprint
