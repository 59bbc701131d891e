"""Alignment runs from config to checkpoint, under Ray and in this process.

Oracle: a run of one worker in this process, which nobody disturbs.
"""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training_files import (
    align_config,
    metrics,
    run_here,
    seeded_metrics,
    stop_at_the_fourth_step,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from pipelines.errors import InputError
from pipelines.train import AlignConfig, align, align_in_turn, loop, workers
from tests.pipelines.checkpoints.digest_definition import blake2, described
from tests.tiny_models import tiny_tokenizer


def fsdp2_config(model: Path, data: Path) -> AlignConfig:
    """Two workers, gradients accumulated, enough steps to be hit in the middle."""
    return align_config(
        model, data, strategy="fsdp2", num_workers=2, micro_batch_size=2, num_steps=12
    )


@pytest.fixture(scope="module")
def fsdp2_run(
    ray_cluster: None, tiny_llama: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An undisturbed run under Ray Train, which writes TensorBoard's files too."""
    config = fsdp2_config(tiny_llama, preferences).model_copy(update={"tensorboard": True})
    return align(config, tmp_path_factory.mktemp("runs") / "fsdp2")


@pytest.mark.ray
def test_workers_follow_the_curve_of_one_process(
    fsdp2_run: Path, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Neither the layout nor the number of workers changes a step."""
    folder = run_here(align_config(tiny_llama, preferences, num_steps=12), tmp_path / "single")
    alone = metrics(folder)
    assert [line["step"] for line in alone] == list(range(1, 13))
    assert alone[0]["loss"] == pytest.approx(0.6931472, rel=1e-6)  # log 2: policy is reference
    assert alone[-1]["loss"] < 0.65
    for one, other in zip(alone, metrics(fsdp2_run), strict=True):
        for name in ("loss", "gradient_norm", "chosen_log_probability", "learning_rate"):
            assert other[name] == pytest.approx(one[name], rel=2e-5), name
    assert metrics(fsdp2_run)[-1]["delta_norm"] == pytest.approx(alone[-1]["delta_norm"], rel=1e-5)
    weights = (AutoModelForCausalLM.from_pretrained(p) for p in (fsdp2_run, folder / "model"))
    for one, other in zip(*(model.state_dict().values() for model in weights), strict=True):
        assert torch.allclose(one, other, atol=2e-6)


@pytest.mark.ray
def test_output_is_an_ordinary_checkpoint(fsdp2_run: Path, tiny_llama: Path) -> None:
    """transformers loads it; every tensor has moved; config and provenance are there."""
    before = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    model = AutoModelForCausalLM.from_pretrained(fsdp2_run)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(fsdp2_run).chat_template
    record = json.loads((fsdp2_run / "poise.json").read_text())
    assert record["config"]["strategy"] == "fsdp2"
    assert set(record["inputs"]) == {"model", "data"}
    # No rank has a whole block of a tensor, so the digest is of what was written.
    assert record["weights"] == blake2(described(load_file(fsdp2_run / "model.safetensors")))
    assert f"base_model:\n- {tiny_llama}\n" in (fsdp2_run / "README.md").read_text()
    assert not (fsdp2_run.parent / ".fsdp2.partial").exists()
    for name, tensor in model.state_dict().items():
        assert not torch.equal(before[name], tensor), name


@pytest.mark.ray
def test_tensorboard_files_are_in_the_output(fsdp2_run: Path) -> None:
    """Every number of metrics.jsonl, for each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(fsdp2_run / "tensorboard"))
    events.Reload()
    lines = metrics(fsdp2_run)
    for name in ("loss", "gradient_norm", "tokens_per_s"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([line[name] for line in lines], rel=1e-6), name


@pytest.mark.ray
def test_a_finished_run_is_left_alone(fsdp2_run: Path, tiny_llama: Path, preferences: Path) -> None:
    """The same config again does nothing, also with other settings that change no result."""
    before = (fsdp2_run / "model.safetensors").stat().st_mtime_ns
    config = fsdp2_config(tiny_llama, preferences).model_copy(update={"checkpoint_every": 3})
    assert align(config, fsdp2_run) == fsdp2_run
    assert (fsdp2_run / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.ray
def test_a_killed_worker_changes_nothing(
    fsdp2_run: Path, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """One of two workers is killed in the middle of its second run, and again once that has got
    further, which is more often than max_failures: it ends with the bytes of a run that was alone
    and undisturbed, and the first one is not made again.
    """
    config = fsdp2_config(tiny_llama, preferences)
    short = config.model_copy(update={"num_steps": 2, "seed": 5})
    first, out, killed = tmp_path / "first", tmp_path / "out", []
    assassin = threading.Thread(target=kill_workers, args=(tmp_path / ".out.partial", killed))
    assassin.start()
    assert config.max_failures == 1
    assert align_in_turn([(short, first), (config, out)]) == [first, out]
    assassin.join()
    assert len(killed) == 2
    file = "model.safetensors"
    assert (out / file).read_bytes() == (fsdp2_run / file).read_bytes()
    assert seeded_metrics(out) == seeded_metrics(fsdp2_run)
    assert len(metrics(first)) == 2
    assert (first / file).stat().st_mtime_ns < (out / "config.json").stat().st_mtime_ns
    assert sorted(path.name for path in tmp_path.iterdir()) == [".poise-cache", "first", "out"]


def test_runs_in_turn_want_the_same_workers(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    two = fsdp2_config(tiny_llama, preferences)
    one = two.model_copy(update={"num_workers": 1})
    with pytest.raises(InputError, match=r"^num_workers: found 1 and 2; allowed: one value"):
        align_in_turn([(one, tmp_path / "one"), (two, tmp_path / "two")])
    assert not list(tmp_path.iterdir())


def kill_workers(folder: Path, killed: list[int]) -> None:
    """SIGKILL one training worker of this session's Ray once five steps are done, and one of those
    that have come since once nine are.
    """
    path, seen = folder / "metrics.jsonl", set()
    deadline = time.monotonic() + 240
    for after_steps in (5, 9):
        while not path.is_file() or len(path.read_text().splitlines()) < after_steps:
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        found = psutil.Process().children(recursive=True)
        workers = {p.pid for p in found if "RayTrainWorker" in p.name() + " ".join(p.cmdline())}
        killed.append(max(workers - seen))
        os.kill(killed[-1], signal.SIGKILL)
        seen |= workers


def test_interrupted_run_ends_with_the_same_bytes(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stopped between checkpoints repeats the lost steps exactly."""
    config = align_config(tiny_llama, preferences)
    whole = run_here(config, tmp_path / "whole")
    broken = tmp_path / "broken"
    stop_at_the_fourth_step(config, broken, monkeypatch)
    assert len(metrics(broken)) == 3  # the third step is lost: the last checkpoint is the second's
    run_here(config, broken)
    assert seeded_metrics(broken) == seeded_metrics(whole)
    file = "model/model.safetensors"
    assert (broken / file).read_bytes() == (whole / file).read_bytes()


def test_a_model_with_dropout_trains_without(preferences: Path, tmp_path: Path) -> None:
    """The first step's policy is its own reference, and two runs have the same numbers."""
    tokenizer = tiny_tokenizer()
    settings = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=2, n_head=2
    )
    assert settings.resid_pdrop > 0
    model = tmp_path / "gpt2"
    GPT2LMHeadModel(settings).save_pretrained(model)
    tokenizer.save_pretrained(model)
    config = align_config(model, preferences, num_steps=3)
    runs = [seeded_metrics(run_here(config, tmp_path / name)) for name in ("one", "two")]
    assert runs[0][0]["margin"] == pytest.approx(0.0, abs=1e-6)
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("cores", "workers", "expected"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_a_worker_has_its_share_of_the_cores(
    cores: int, workers: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that this process may use, or Ray where it has been given fewer."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(workers))
    assert loop.share_of_cores() == expected


@pytest.mark.ray
def test_a_worker_has_no_more_cores_than_ray(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture's Ray has four."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert loop.share_of_cores() == 4


def test_equal_threads_make_equal_bytes(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as OMP_NUM_THREADS says, where it is set."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    try:
        runs = [run_here(align_config(tiny_llama, preferences), tmp_path / n) for n in "ab"]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    weights = {(run / "model" / "model.safetensors").read_bytes() for run in runs}
    assert len(weights) == 1 and seeded_metrics(runs[0]) == seeded_metrics(runs[1])


def test_the_reference_is_shown_before_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows with the time that is left, and then the steps of the run."""
    monkeypatch.setattr("pipelines.progress.PLAIN_INTERVAL_S", 0.0)
    job = workers.Job("out", {"folder": str(tmp_path), "num_steps": 12}, lambda: None)
    with workers._Screen([job]) as screen:
        for done in (10, 55, 100):
            (tmp_path / "reference.json").write_text(json.dumps({"done": done, "total": 100}))
            screen.show(job)
        record = {"step": 3, "loss": 0.5, "tokens_per_s": 10.0, "memory_bytes": 2**30}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        screen.show(job)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  rows of the reference: 10/100"
    assert re.fullmatch(r"  rows of the reference: 55/100, about \d+ s left", lines[1])
    assert lines[2:] == ["  steps: 3/12, loss 0.500, 10 tokens/s, 1.0 GiB"]
