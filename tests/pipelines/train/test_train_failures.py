"""What ends a run, or never lets it begin: one clear line, and nothing half-written.

Oracles: messages written by hand, errors of the system itself, and undisturbed runs.
"""

import errno
import json
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_workers, run_workers_in_turn
from pydantic import ValidationError
from torch.multiprocessing import ProcessRaisedException
from training_files import (
    align_config,
    broken_off,
    metrics,
    preference_rows,
    run_here,
    write_rows,
)
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.errors import InputError
from pipelines.train import align, plan_alignment
from pipelines.train.checkpoints import saved_steps
from pipelines.train.errors import DivergenceError, raise_failure
from pipelines.train.strategies import build_strategy
from tests.tiny_models import save_tiny_llama

BAD_FIELDS = {
    "batch": (
        {"num_workers": 3, "strategy": "ddp"},
        "global_batch_size: found 8; allowed: a multiple of num_workers (3)",
    ),
    "micro-batch": (
        {"micro_batch_size": 3},
        "micro_batch_size: found 3; allowed: a divisor of 8, the rows of one step on one worker",
    ),
    "steps and epochs": ({"num_epochs": 1}, "give either num_steps or num_epochs"),
    "single": ({"num_workers": 2}, "num_workers: found 2; allowed with strategy single: 1"),
    "objective": (
        {"objective": {"name": "hinge", "label_smoothing": 0.1}},
        "label_smoothing: has no effect on hinge; allowed with dpo",
    ),
    "objective's parameter": (
        {"objective": {"name": "sft", "beta": 0.1}},
        "beta: has no effect on sft; allowed with dpo, robust, hinge, ipo, apo_zero, apo_down, "
        "bco_pair, simpo, orpo, kto",
    ),
    "weights without a sum": (
        {"objective": {"name": "dpo", "loss_weights": [0.5]}},
        "loss_weights: has no effect on dpo; allowed with a list",
    ),
    "weights of a sum": (
        {"objective": {"name": ["dpo", "sft"], "loss_weights": [0.5]}},
        "loss_weights: found 1; allowed: 2, one for each name",
    ),
    "a sum of one": (
        {"objective": {"name": ["dpo", "dpo"]}},
        "name: found ['dpo', 'dpo']; allowed: one name, or a list of different ones",
    ),
    "a sum of different rows": (
        {"objective": {"name": ["dpo", "kto"]}},
        "name: found 'kto' in a sum; allowed: sft, dpo, robust, hinge, ipo, apo_zero, apo_down, "
        "bco_pair",
    ),
    "parameter of a sum": (
        {"objective": {"name": ["hinge", "sft"], "label_smoothing": 0.1}},
        "label_smoothing: has no effect on hinge + sft; allowed with dpo, robust",
    ),
    "optimizer": (
        {"optimizer": {"learning_rate": 1e-3, "density": 0.5}},
        "density: has no effect with adamw",
    ),
    "delta without merging": (
        {"optimizer": {"learning_rate": 1e-3, "missing_delta": "exclude"}},
        "missing_delta: has no effect with adamw",
    ),
    "offload": (
        {"cpu_offload": True},
        "cpu_offload: has no effect with strategy single; allowed with fsdp2, zero1, zero2, zero3",
    ),
    "asynchronous": (
        {"asynchronous_checkpoints": True, "strategy": "zero3"},
        "asynchronous_checkpoints: found strategy zero3; allowed with it: single, ddp, fsdp2",
    ),
    "reference": (
        {"objective": {"name": "sft"}, "reference_model": "x"},
        "reference_model: has no effect with objective sft, which has no reference",
    ),
    "reference on the fly": (
        {"objective": {"name": "orpo"}, "reference_log_probabilities": "on_the_fly"},
        "reference_log_probabilities: has no effect with objective orpo, which has no reference",
    ),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_fields_that_do_not_fit(name: str, tiny_llama: Path, preferences: Path) -> None:
    """Each names the field, what was found and what is allowed."""
    fields, message = BAD_FIELDS[name]
    with pytest.raises(ValidationError) as error:
        align_config(tiny_llama, preferences, **fields)
    assert message in str(error.value)


def test_a_tokenizer_of_another_vocabulary(preferences: Path, tmp_path: Path) -> None:
    """A token that the model does not have is found before training."""
    path = save_tiny_llama(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(20)
    model.save_pretrained(path)
    with pytest.raises(InputError, match=r"gives token \d+; its vocabulary has 20 tokens"):
        plan_alignment(align_config(path, preferences))


def test_a_reference_of_another_vocabulary(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Its log-probabilities would be of other tokens."""
    path = save_tiny_llama(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    with pytest.raises(InputError, match="found a vocabulary of 20 tokens; the model's has 47"):
        plan_alignment(align_config(tiny_llama, preferences, reference_model=path))


def test_a_reference_delta_that_does_not_fit(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """A model that is not there; one of other widths: the tensor, found and needed shape."""
    optimizer: dict[str, Any] = {
        "name": "ondare",
        "learning_rate": 1e-3,
        "density": 0.5,
        "alpha": 0.1,
        "tau": {"base": tmp_path / "none", "tuned": tiny_llama},
    }
    with pytest.raises(InputError, match=r"model .*none: no such directory"):
        plan_alignment(align_config(tiny_llama, preferences, optimizer=optimizer))
    wide = LlamaConfig(
        vocab_size=47,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    optimizer["tau"] = {"base": tmp_path / "wide", "tuned": tmp_path / "wide"}
    message = re.escape(
        "optimizer.tau: 'model.embed_tokens.weight' has shape (47, 16); the parameter's is (47, "
        "32); or choose optimizer.missing_delta"
    )
    with pytest.raises(InputError, match=f"^{message}$"):
        plan_alignment(align_config(tiny_llama, preferences, optimizer=optimizer))


@pytest.mark.ray
def test_an_unfinished_run_of_another_config(
    ray_cluster: None, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """It is not overwritten unasked."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "run.json").write_text('{"fingerprint": "x", "num_workers": 1}')
    with pytest.raises(InputError, match="holds an unfinished run of another config"):
        align(align_config(tiny_llama, preferences), tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        align(align_config(tiny_llama, preferences), tmp_path / "there")


@pytest.mark.ray
def test_what_needs_a_gpu(
    ray_cluster: None, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Activations are in CPU memory already; nothing is written."""
    config = align_config(tiny_llama, preferences, activation_offload=True)
    with pytest.raises(InputError, match="activation_offload: has no effect without a GPU"):
        align(config, tmp_path / "out")
    config = align_config(tiny_llama, preferences, attention="flex_attention")
    with pytest.raises(InputError, match="attention: found flex_attention, which needs a GPU"):
        align(config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_divergence_stops_with_advice(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """A loss that is not finite is recorded for the driver and never tried again."""
    config = align_config(
        tiny_llama, preferences, optimizer={"learning_rate": 1e30}, schedule="constant"
    )
    folder = run_here(config, tmp_path / "run")
    with pytest.raises(DivergenceError, match=r"step 2: the .* is nan; try a lower optimizer"):
        raise_failure(folder)
    assert not (folder / "model").exists()
    assert len(metrics(run_here(config, folder))) == 1  # a worker started again does nothing


@pytest.mark.parametrize(
    ("objective", "against", "advice"),
    [
        ("dpo", "the reference", ", a larger objective.beta or objective.rpo_alpha"),
        ("hinge", "the reference", " or a larger objective.beta"),
        ("simpo", "the first 10 steps", " or a longer warmup_share"),
    ],
)
def test_collapse_stops_with_advice(
    objective: str,
    against: str,
    advice: str,
    tiny_llama: Path,
    preferences: Path,
    tmp_path: Path,
) -> None:
    """A policy that forgets the chosen responses is stopped where the config says so, with or
    without a reference; and a run that goes on from a checkpoint stops at the same step.
    """
    config = align_config(
        tiny_llama,
        preferences,
        objective={"name": objective},
        optimizer={"learning_rate": 5e-2},
        schedule="constant",
        num_steps=40,
        checkpoint_every=5,
        min_chosen_log_ratio=-0.5,
    )
    folder = run_here(config, tmp_path / "run")
    pattern = (
        rf"step \d+: the chosen responses have lost \d\.\d\d nats a token against {against} "
        rf"\(min_chosen_log_ratio -0.5\); try a lower optimizer.learning_rate{advice}$"
    )
    with pytest.raises(DivergenceError, match=pattern) as first:
        raise_failure(folder)
    assert saved_steps(folder)
    (folder / "failure.json").unlink()
    with pytest.raises(DivergenceError, match=pattern) as second:
        raise_failure(run_here(config, folder))
    assert str(first.value) == str(second.value)


@pytest.mark.parametrize("objective", ["sft", "orpo", "simpo"])
def test_learning_without_a_reference_is_no_collapse(
    objective: str, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Responses that become likelier never stop a run, however narrow the limit."""
    rows = [row | {"messages": row["prompt"] + row["chosen"]} for row in preference_rows(40)]
    config = align_config(
        tiny_llama,
        write_rows(tmp_path / "rows.jsonl", rows),
        objective={"name": objective, **({"beta": 0.5} if objective == "simpo" else {})},
        num_steps=15,
        min_chosen_log_ratio=-0.05,
    )
    assert len(metrics(run_here(config, tmp_path / "run"))) == 15


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_last_checkpoint(
    asynchronous: bool,
    tiny_llama: Path,
    preferences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that could not be written never gets a name; the run goes on from the one before."""
    from pipelines.train.strategies import native

    config = align_config(tiny_llama, preferences, asynchronous_checkpoints=asynchronous)
    real = native._write

    def full(state: dict[str, Any], group: None, folder: Path) -> None:
        if folder.name == ".step-4.partial":
            (folder / "half").write_bytes(b"x" * 100)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, group, folder)

    monkeypatch.setattr(native, "_write", full)
    place = tmp_path / "run" / "checkpoints" / "step-4"
    message = (
        f"{place}: no room for this checkpoint ([Errno 28] No space left on device); step 2 is the "
        "last good one; make room and run the same command again to go on"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        run_here(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [2]
    with pytest.raises(InputError, match=re.escape(message)):
        raise_failure(tmp_path / "run")
    monkeypatch.setattr(native, "_write", real)
    (tmp_path / "run" / "failure.json").unlink()
    assert len(metrics(run_here(config, tmp_path / "run"))) == 6


@dataclass(frozen=True)
class FullDisk:
    """A run that had room all along, and one that had none for a while: what was said then, and the
    checkpoints that stood.
    """

    whole: Path
    run: Path
    said: str
    saved: list[int]


@pytest.fixture(scope="module")
def full_disks(
    tiny_llama: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, FullDisk]:
    """By strategy. For real: the system refuses to write on in a run that goes on after step 2.
    What has room takes turns on the same workers.
    """
    folder, found = tmp_path_factory.mktemp("full"), {}
    configs = {
        strategy: align_config(
            tiny_llama,
            preferences,
            strategy=strategy,
            num_workers=2,
            micro_batch_size=2,
            keep_checkpoints=3,
        )
        for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    }
    wholes = {name: folder / name / "whole" for name in configs}
    run_workers_in_turn({wholes[name]: config for name, config in configs.items()})
    for name, config in configs.items():
        run = broken_off(wholes[name], folder / name / "run", checkpoint=2, lines=3)
        with pytest.raises(ProcessRaisedException):
            run_workers(config, run, max_file_bytes=20_000)
        with pytest.raises(InputError) as error:
            raise_failure(run)
        found[name] = FullDisk(wholes[name], run, str(error.value), saved_steps(run))
        (run / "failure.json").unlink()
    run_workers_in_turn({found[name].run: config for name, config in configs.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_full_disk_under_every_strategy(strategy: str, full_disks: dict[str, FullDisk]) -> None:
    """One line says so, the checkpoint before stays, and with room again the run ends with the
    bytes of one that had it all along.
    """
    found = full_disks[strategy]
    place = found.run / "checkpoints" / "step-4"
    said = re.escape(f"{place}: no room for this checkpoint (") + r"[^\n]*"
    ending = re.escape(
        "); step 2 is the last good one; make room and run the same command again to go on"
    )
    assert re.fullmatch(said + ending, found.said)
    assert found.saved == [2]
    weights = "model/model.safetensors"
    assert (found.run / weights).read_bytes() == (found.whole / weights).read_bytes()


def test_a_checkpoint_that_cannot_be_written_is_an_os_error(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """For real, by a limit on the size of files: the driver is told what the system said."""
    strategy = build_strategy(align_config(tiny_llama, preferences), torch.device("cpu"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            strategy.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_the_last_checkpoints_are_kept(
    asynchronous: bool, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """As many as the config says."""
    fields = {"checkpoint_every": 1, "keep_checkpoints": 3}
    config = align_config(tiny_llama, preferences, **fields, asynchronous_checkpoints=asynchronous)
    assert saved_steps(run_here(config, tmp_path / "run")) == [4, 5, 6]


@pytest.mark.ray
def test_a_failure_under_ray_is_one_line(
    ray_cluster: None, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """From a worker to whoever called, without a retry, and nothing stands under the name."""
    config = align_config(
        tiny_llama,
        preferences,
        optimizer={"learning_rate": 1e30},
        schedule="constant",
        strategy="fsdp2",
        num_workers=2,
    )
    with pytest.raises(DivergenceError) as error:
        align(config, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    too_many = align_config(tiny_llama, preferences, strategy="ddp", num_workers=8)
    with pytest.raises(InputError, match=r"num_workers: found 8; allowed: up to \d"):
        align(too_many, tmp_path / "wide")
