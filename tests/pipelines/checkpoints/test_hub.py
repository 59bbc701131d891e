"""Models by their names on the hub.

Oracles: the stub's own files and hashes; huggingface_hub itself, which must be able to read what is
written into its cache, and fills it for us.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from pipelines.checkpoints import hub as models
from pipelines.checkpoints.hub import described, folder_of, hub_ids, pinned
from pipelines.errors import InputError
from pipelines.hub.cache import parse_name, snapshot_of
from pipelines.hub.offline import ASKED_OFFLINE
from tests.conftest import use_hub
from tests.hub_stub import Stub
from tests.tiny_models import save_tiny_llama

# Beside a model on the hub: what it needs, and what nobody asked for.
NEEDED = {"LICENSE": b"free", "1_Pooling/config.json": b"{}"}
UNNEEDED = {
    "README.md": b"a card",
    ".gitattributes": b"*.safetensors filter=lfs",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the same once more",
    "model.gguf": b"and again",
    "original/consolidated.00.pth": b"a pickle",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"for others",
    "modeling_own.py": b"raise SystemExit('run')",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ASKED_OFFLINE, "1")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("org/name", ("org/name", "main")),
        ("Qwen/Qwen3-0.6B", ("Qwen/Qwen3-0.6B", "main")),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("hf://org/name@v1", ("org/name", "v1")),
        ("hf://models/org/name", ("org/name", "main")),
        (str(Path("hf://org/name")), ("org/name", "main")),  # a path has lost a slash
        ("hf://datasets/org/name", None),
        ("/org/name", None),
        ("./name", None),
        ("../name", None),
        ("~/name", None),
        ("name", None),
        ("a/b/c", None),
        ("org/", None),
        ("org/na--me", None),
        ("org/a..b", None),
        ("s3://bucket/name", None),
        ("s3:/bucket/name", None),
        ("org/a+org/b", None),
        ("org/name@", None),
    ],
)
def test_what_is_a_name_of_the_hub(name: str, meant: tuple[str, str] | None) -> None:
    found = parse_name(name)
    assert (None if found is None else (found.id, found.revision)) == meant


def test_a_folder_of_that_name_wins(hub: Stub, llama: Path, tmp_path: Path, monkeypatch) -> None:
    hub.add("org/name", llama)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert (pinned("org/name"), folder_of("org/name")) == ("org/name", Path("org/name"))
    assert pinned("a/b/c") == "a/b/c"
    assert not hub.asked


def test_a_model_comes_whole_and_nothing_else_does(hub: Stub, llama: Path) -> None:
    commit = hub.add("org/name", llama, **NEEDED, **UNNEEDED)
    folder = folder_of("org/name")
    expected = contents(llama) | NEEDED
    assert contents(folder) == {k: v for k, v in expected.items() if k not in UNNEEDED}
    assert set(hub.fetched()) == contents(folder).keys()
    assert pinned("org/name") == f"org/name@{commit}" == described(folder)
    found = snapshot_of(folder)
    assert found is not None and (found[0].id, found[1]) == ("org/name", commit)


def test_the_hubs_own_library_reads_what_was_fetched(hub: Stub, llama: Path) -> None:
    commit = hub.add("org/name", llama)
    folder = folder_of("org/name")
    assert snapshot_download("org/name", local_files_only=True) == str(folder)
    report = scan_cache_dir(constants.HF_HUB_CACHE)
    assert not report.warnings
    [repository] = report.repos
    [revision] = repository.revisions
    assert (revision.commit_hash, revision.refs) == (commit, {"main"})
    assert {file.file_name for file in revision.files} == {f.name for f in llama.iterdir()}


def test_what_the_hubs_own_library_fetched_is_not_fetched_again(
    hub: Stub, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", llama)
    code = "import huggingface_hub; print(huggingface_hub.snapshot_download('org/name'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    hub.asked.clear()
    offline(monkeypatch)
    assert folder_of("org/name") == Path(done.stdout.strip())
    assert not hub.asked
    monkeypatch.setenv(ASKED_OFFLINE, "0")
    assert folder_of("org/name") == Path(done.stdout.strip())
    assert not hub.fetched()


def test_a_known_commit_needs_nobody(hub: Stub, llama: Path) -> None:
    name = pinned("org/name@" + hub.add("org/name", llama))
    hub.asked.clear()
    assert contents(folder_of(name)) == contents(llama)
    assert not hub.asked


def test_a_branch_is_asked_for_and_its_new_commit_taken(
    hub: Stub, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.add("org/name", llama)
    assert pinned("org/name") == f"org/name@{first}"
    second = hub.add("org/name", llama, LICENSE=b"another")
    assert pinned("org/name") == f"org/name@{second}" != f"org/name@{first}"
    assert hub.fetched().count("model.safetensors") == 1  # the same content is not fetched again
    offline(monkeypatch)
    assert pinned("org/name") == f"org/name@{second}"


def test_another_branch_and_a_tokenizer_alone(hub: Stub, llama: Path) -> None:
    hub.add("org/name", llama)
    commit = hub.add("org/name", llama, "v2", LICENSE=b"v2")
    folder = folder_of("org/name@v2", "tokenizer")
    assert folder.name == commit
    assert "tokenizer.json" in contents(folder)
    assert "model.safetensors" not in hub.fetched()
    assert (folder_of("org/name@v2") / "LICENSE").read_bytes() == b"v2"


def test_shards_are_those_of_the_index(hub: Stub, llama: Path) -> None:
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    shards = {"part-1.safetensors": b"one", "part-2.safetensors": b"two"}
    files = contents(llama) | shards
    del files["model.safetensors"]
    files |= {"model.safetensors.index.json": json.dumps(index).encode(), "part-3.safetensors": b""}
    hub.models["org/name"] = {"main": files}
    found = contents(folder_of("org/name"))
    assert found.keys() == files.keys() - {"part-3.safetensors"}


@pytest.mark.parametrize("times", [1, 3])
def test_a_line_that_is_cut_is_taken_up_where_it_ended(hub: Stub, llama: Path, times: int) -> None:
    hub.add("org/name", llama)
    hub.cut["model.safetensors"] = times
    assert contents(folder_of("org/name")) == contents(llama)
    ranges = [r for _, path, r, _ in hub.asked if path.startswith("storage:")]
    size = (llama / "model.safetensors").stat().st_size
    expected, left = [""], size
    for _ in range(times):
        left -= left // 2
        expected.append(f"bytes={size - left}-")
    assert ranges == expected


def test_a_killed_download_goes_on_in_the_next_process(
    hub: Stub, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", llama)
    hub.cut["model.safetensors"] = 100  # the line is cut until nothing comes any more
    with pytest.raises(InputError, match=r"not all of it \(as model\.safetensors\)"):
        folder_of("org/name")
    hub.cut.clear()
    hub.asked.clear()
    assert contents(folder_of("org/name")) == contents(llama)
    [(_, path, begin, _)] = [each for each in hub.asked if each[1].startswith("storage:")]
    assert path.endswith("model.safetensors")
    assert int(begin.removeprefix("bytes=").rstrip("-")) > 0


@pytest.mark.parametrize("place", ["model.safetensors", "config.json"])
def test_bytes_with_another_hash_are_refused_and_forgotten(
    hub: Stub, llama: Path, place: str
) -> None:
    """Large files have a SHA-256 on the hub, small ones git's SHA-1."""
    hub.add("org/name", llama)
    hub.corrupt.add(place)
    with pytest.raises(InputError, match=rf"^model org/name@\w+: {place}: came with hash \w+; "):
        folder_of("org/name")
    assert not [f for f in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*") if f.name == place]
    hub.corrupt.clear()
    assert contents(folder_of("org/name")) == contents(llama)


def test_the_login_opens_what_is_gated_and_goes_nowhere_else(
    hub: Stub, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/gated", llama)
    hub.gated.add("org/gated")
    with pytest.raises(InputError, match=r"is gated: .*/org/gated says how.*hf auth login") as none:
        folder_of("org/gated")
    assert "\n" not in str(none.value)
    token = Path(constants.HF_TOKEN_PATH)
    token.write_text("hf_of_somebody_else")
    with pytest.raises(InputError, match=r"is gated: .*a token that may read it") as other:
        folder_of("org/gated")
    token.write_text(hub.token)
    assert contents(folder_of("org/gated")) == contents(llama)
    sent = {path.startswith("storage:"): tokens for _, path, _, tokens in hub.asked}
    assert sent == {False: f"Bearer {hub.token}", True: ""}
    shown = capsys.readouterr()
    assert "hf_" not in shown.out + shown.err + str(none.value) + str(other.value)


@pytest.mark.parametrize("is_good", [True, False])
def test_a_login_that_ends_is_renewed(
    is_good: bool,
    hub: Stub,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A login from a browser in its last day: once, and kept for later; libraries stay offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.add("org/gated", llama)
    hub.gated.add("org/gated")
    token, stored = Path(constants.HF_TOKEN_PATH), Path(constants.HF_STORED_TOKENS_PATH)
    old, renewal = f"hf_old_{is_good}", hub.refresh_token if is_good else "hf_revoked"
    token.parent.mkdir()
    token.write_text(old)
    end = int(time.time()) + 60
    stored.write_text(f"[own]\nhf_token = {old}\nrefresh_token = {renewal}\nexpires_at = {end}\n")
    if is_good:
        assert contents(folder_of("org/gated")) == contents(llama)
        assert token.read_text() == hub.token and old not in stored.read_text()
    else:
        with pytest.raises(InputError, match=r"is gated: .*a token that may read it"):
            folder_of("org/gated")
        assert token.read_text() == old
    assert [path for method, path, _, _ in hub.asked if method == "POST"] == ["/oauth/token"]
    assert constants.HF_HUB_OFFLINE
    shown = capsys.readouterr()
    assert "hf_" not in shown.out + shown.err


def test_what_is_not_there_is_said_in_one_line(hub: Stub, llama: Path) -> None:
    hub.add("org/name", llama)
    hub.add("org/private", llama)
    hub.private.add("org/private")
    for name in ("org/nothing", "org/private"):
        with pytest.raises(
            InputError, match=f"^model {name}: no such directory here, and the hub does not know it"
        ):
            folder_of(name)
    with pytest.raises(InputError, match=r"^model org/name@v9: the hub has no revision 'v9' of it"):
        folder_of("org/name@v9")
    with pytest.raises(InputError, match="has no revision"):
        folder_of("org/name@" + "0" * 40)


def test_a_renamed_model_is_found_by_its_old_name(
    hub: Stub, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add("new/name", llama)
    hub.renamed["old/name"] = "new/name"
    assert pinned("old/name") == f"old/name@{commit}"
    assert "old/name is called new/name on the hub now" in capsys.readouterr().err


def test_pickles_alone_are_refused_before_anything_comes(hub: Stub, llama: Path) -> None:
    files = contents(llama) | {"pytorch_model.bin": b"a pickle"}
    del files["model.safetensors"]
    hub.models["org/pickle"] = {"main": files}
    with pytest.raises(InputError, match=r"^model org/pickle: found pytorch_model.bin, a pickle"):
        folder_of("org/pickle")
    assert not hub.fetched()


def test_without_a_network_the_cache_serves_and_what_it_lacks_is_named(
    hub: Stub,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit = hub.add("org/name", llama)
    pinned("org/name")
    use_hub("http://127.0.0.1:9", tmp_path / "hf-home", monkeypatch)  # nobody answers there
    assert pinned("org/name") == f"org/name@{commit}"
    assert f"the cache has commit {commit[:12]}" in capsys.readouterr().err
    with pytest.raises(InputError) as unreachable:
        folder_of("org/other@v2")
    assert str(unreachable.value).startswith("model org/other@v2: no such directory, not in the ")
    assert "http://127.0.0.1:9 cannot be reached" in str(unreachable.value)
    assert str(unreachable.value).endswith("hf download org/other --revision v2")


def test_the_users_offline_asks_nobody(
    hub: Stub, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", llama)
    folder_of("org/name", "tokenizer")
    hub.asked.clear()
    offline(monkeypatch)
    assert folder_of("org/name", "tokenizer").is_dir()
    with pytest.raises(InputError, match=r"not all of it \(as .*unset HF_HUB_OFFLINE$"):
        folder_of("org/name")
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE says not to ask.*hf download org/other,"):
        folder_of("org/other")
    assert not hub.asked


def test_a_hub_that_is_down_is_as_none(hub: Stub, llama: Path) -> None:
    commit = hub.add("org/name", llama)
    hub.status = 503
    with pytest.raises(InputError, match=r"cannot be reached \(it answers with status 503\)"):
        folder_of("org/name")
    hub.status = 403  # without the hub's own words
    with pytest.raises(InputError, match=r"answers with status 403, which is perhaps a proxy's"):
        folder_of("org/name")
    hub.status = None
    folder_of("org/name")
    hub.status = 503
    assert pinned("org/name") == f"org/name@{commit}"


def test_a_place_that_leads_out_of_the_folder_is_refused(hub: Stub, llama: Path) -> None:
    hub.models["org/bad"] = {"main": contents(llama) | {"../../out.json": b"{}"}}
    with pytest.raises(InputError, match="leads out of its folder"):
        folder_of("org/bad")


def test_another_node_fetches_the_same_to_the_same_place(
    hub: Stub, llama: Path, tmp_path: Path
) -> None:
    """The driver's cache is not there: its path is all that a worker is given."""
    commit = hub.add("org/name", llama)
    repository = snapshot_of(folder_of("org/name"))[0]  # type: ignore[index]
    elsewhere = tmp_path / "driver" / "models--org--name" / "snapshots" / commit
    assert repository.cache != elsewhere.parents[2]
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        models.bring([elsewhere], offline=True)
    models.bring([elsewhere, tmp_path, "no/such"], offline=False)
    assert contents(elsewhere) == contents(llama)
    hub.asked.clear()
    models.bring([elsewhere], offline=False)
    assert not hub.asked


def test_ids_for_cards(hub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_ids("org/name@" + "a" * 40) == ["org/name"]
    assert hub_ids("in") == ["in"]
    assert hub_ids("in+in") == ["in+in"]
    assert hub_ids("org/base@v1+in") == ["org/base", "in"]


def test_a_cache_that_cannot_be_written_is_named(hub: Stub, llama: Path, tmp_path: Path) -> None:
    hub.add("org/name", llama)
    (tmp_path / "hf-home").mkdir()
    (tmp_path / "hf-home" / "hub").write_text("a file")
    with pytest.raises(InputError, match=r"^model org/name: .* cannot be written.*HF_HOME"):
        folder_of("org/name")


def test_hashes_of_the_stub_are_gits() -> None:
    """The stub's oracle: git's own hash of an empty file."""
    assert hashlib.sha1(b"blob 0\0").hexdigest() == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
