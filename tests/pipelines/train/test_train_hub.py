"""Training of a model on the hub.

Oracle: the training of the same model in a folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from training_files import align_config, run_here

from pipelines.checkpoints.hub import folder_of
from pipelines.train import plan_alignment
from pipelines.train.loop import train_worker
from pipelines.train.models import with_folders
from pipelines.train.run import _commit, worker_settings
from tests.hub_stub import Stub


def test_a_run_is_that_of_the_folder_and_its_record_names_the_commit(
    hub: Stub, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    commit = hub.add("org/name", tiny_llama)
    named = align_config(Path("hf://org/name"), preferences, reference_model="org/name@main")
    configs = {"hub": named, "here": align_config(tiny_llama, preferences)}
    for name, config in configs.items():
        config, out = with_folders(config), tmp_path / name / "out"
        run_here(config, out.with_name(".out.partial"))
        _commit(config, plan_alignment(config, out.parent / "cache"), out, force=False)
    records = {n: json.loads((tmp_path / n / "out" / "poise.json").read_text()) for n in configs}
    assert records["hub"]["weights"] == records["here"]["weights"]
    assert records["hub"]["config"]["model"] == f"org/name@{commit}"
    assert records["hub"]["config"]["reference_model"] == f"org/name@{commit}"
    assert records["hub"]["hub"] == [{"id": "org/name", "commit": commit}] * 2
    front = yaml.safe_load((tmp_path / "hub" / "out" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == ["org/name"]


def test_the_fingerprint_does_not_depend_on_where_the_cache_is(
    hub: Stub,
    tiny_llama: Path,
    preferences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add("org/name", tiny_llama)
    config = align_config(Path("org/name"), preferences)
    first = plan_alignment(config, tmp_path / "cache").fingerprint
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    assert plan_alignment(config, tmp_path / "cache").fingerprint == first


def test_a_worker_on_another_node_fetches_for_itself(
    hub: Stub, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    hub.add("org/name", tiny_llama)
    config = with_folders(align_config(Path("org/name"), preferences, num_steps=1))
    folder, cache = tmp_path / "run", tmp_path / "cache"
    folder.mkdir()
    settings = worker_settings(config, plan_alignment(config, cache), folder, cache)
    shutil.rmtree(constants.HF_HUB_CACHE)
    train_worker({"runs": [settings]})
    assert (folder / "model" / "model.safetensors").is_file()
    assert folder_of("org/name") == config.model
