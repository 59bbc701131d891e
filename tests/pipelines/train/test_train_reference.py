"""What the reference says of rows, from its store or on the fly.

Oracles: stored against on-the-fly numbers, a store of all rows against one of some, an undisturbed
computation against a killed one, and transformers in float64.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from processes import run_workers, run_workers_in_turn
from safetensors.torch import load_file
from training_files import (
    align_config,
    metrics,
    preference_rows,
    run_here,
    seeded_metrics,
    write_rows,
)
from transformers import AutoModelForCausalLM

from pipelines.train import AlignConfig, plan_alignment, reference_store
from pipelines.train.data import TokenTable, global_batch
from pipelines.train.reference_store import ReferenceStore
from tests.tiny_models import save_tiny_llama

WEIGHTS = "model/model.safetensors"
LIVE = {"reference_log_probabilities": "on_the_fly"}
WAYS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "micro-batches": {"micro_batch_size": 2},
    "kto": {"objective": {"name": "kto"}},
    "adapters": {"lora": {"rank": 4}, "optimizer": {"learning_rate": 1e-2}},
}


def assert_same(one: Path, other: Path) -> None:
    """Equal runs up to rounding."""
    for line, expected in zip(metrics(one), metrics(other), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["margin"] == pytest.approx(expected["margin"], rel=1e-3, abs=1e-5)
    found, expected = (load_file(folder / WEIGHTS) for folder in (one, other))
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("way", WAYS)
def test_on_the_fly_equals_stored(
    way: str, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """The same curve and weights; the policy begins as the reference, to the last bit."""
    stored = run_here(align_config(tiny_llama, preferences, **WAYS[way]), tmp_path / "stored")
    config = align_config(tiny_llama, preferences, **WAYS[way], **LIVE)
    (tmp_path / "fly").mkdir()
    live = run_here(config, tmp_path / "fly" / "run")
    assert_same(live, stored)
    assert metrics(live)[0]["margin"] == 0.0
    assert metrics(live)[-1]["margin"] > 0.01
    assert metrics(live)[0]["kl_per_token"] == 0.0
    assert metrics(live)[-1]["kl_per_token"] > 1e-5
    assert metrics(stored)[0]["kl_per_token"] < 1e-6
    assert metrics(stored)[-1]["kl_per_token"] > 1e-5
    assert list((tmp_path / "cache").glob("reference-*"))
    assert not list((tmp_path / "fly" / "cache").glob("reference-*"))


def test_estimated_kl_is_unbiased(tiny_llama: Path, tmp_path: Path) -> None:
    """From drawn tokens, over many positions, against the exact one: within its standard error."""
    other = save_tiny_llama(tmp_path / "other", seed=7)
    data = write_rows(tmp_path / "rows.jsonl", preference_rows(400))
    fields = {"reference_model": other, "num_steps": 10, "global_batch_size": 40}
    fields |= {"optimizer": {"learning_rate": 1e-9}}
    stored = run_here(align_config(tiny_llama, data, **fields), tmp_path / "stored")
    live = run_here(align_config(tiny_llama, data, **fields, **LIVE), tmp_path / "live")
    pairs = zip(metrics(stored), metrics(live), strict=True)
    errors = [one["kl_per_token"] - two["kl_per_token"] for one, two in pairs]
    standard_error = stdev(errors) / len(errors) ** 0.5
    assert abs(fmean(errors)) < 3 * standard_error
    assert standard_error < 0.1 * metrics(live)[0]["kl_per_token"]


def reference_of(config: AlignConfig, folder: Path) -> Path:
    """What a run with a cache of its own keeps of its reference."""
    folder.mkdir()
    run_here(config, folder / "run")
    (reference,) = (folder / "cache").glob("reference-*")
    return reference


def bytes_of(reference: Path) -> list[bytes]:
    """Of the parts of a store."""
    return [path.read_bytes() for path in sorted(reference.glob("part-*.arrow"))]


def store_at(reference: Path) -> ReferenceStore:
    """A store, with the table beside it."""
    (tokens,) = reference.parent.glob("tokens-*")
    is_labelled = TokenTable(tokens, 1)._labels[0].null_count == 0
    return ReferenceStore(reference, TokenTable(tokens, 1 if is_labelled else 2))


def rows_of(reference: Path) -> list[int]:
    """The rows that a store has."""
    store = store_at(reference)
    everything = np.arange(store.table.num_rows)
    return everything[store.has(everything)].tolist()


def assert_same_words(one: Path, other: Path, rows: list[int], rel: float = 1e-5) -> None:
    """The same tokens drawn, and log-probabilities up to rounding, for some rows of two stores."""
    first, second = store_at(one), store_at(other)
    mine, yours = (store.drawn(rows, torch.device("cpu")) for store in (first, second))
    assert mine.ids.tolist() == yours.ids.tolist()
    assert torch.allclose(mine.log_probability, yours.log_probability, rtol=0, atol=rel)
    assert torch.allclose(first.values()[rows], second.values()[rows], rtol=rel, atol=0)


def test_what_is_kept_does_not_depend_on_the_batches(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes whatever the micro-batches; and in other passes the same tokens are drawn."""
    fields: dict[str, Any] = {"num_steps": 1, "global_batch_size": 16}
    small, large = (
        reference_of(
            align_config(tiny_llama, preferences, **fields, micro_batch_size=size),
            tmp_path / str(size),
        )
        for size in (2, 16)
    )
    assert bytes_of(small) == bytes_of(large)
    monkeypatch.setattr(reference_store, "MAX_TOKENS", {"cpu": 50})
    other = reference_of(align_config(tiny_llama, preferences, **fields), tmp_path / "other")
    assert_same_words(small, other, rows_of(other))


def test_kl_per_token_by_hand(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """The first step's, against a reference that is not the model: transformers and float64."""
    other = save_tiny_llama(tmp_path / "other", seed=7)
    config = align_config(
        tiny_llama, preferences, reference_model=other, num_steps=1, micro_batch_size=2, **LIVE
    )
    line = metrics(run_here(config, tmp_path / "run"))[0]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path).double().requires_grad_(False)
        for path in (tiny_llama, other)
    )
    table = plan_alignment(config, tmp_path / "cache").table
    total, count = 0.0, 0
    for row in global_batch(table.num_rows, 8, 0, config.seed):
        for ids, marks in table.sequences(row):
            tokens = torch.from_numpy(ids).long()[None]
            p, q = (model(tokens).logits[0, :-1].log_softmax(-1) for model in (policy, reference))
            learned = torch.from_numpy(marks)[1:].bool()
            total += float((p.exp() * (p - q)).sum(-1)[learned].sum())
            count += int(learned.sum())
    assert line["kl_per_token"] == pytest.approx(total / count, rel=1e-5)


def test_another_reference_on_the_fly(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """It is the model that the config names, also beside adapters."""
    other = {"reference_model": save_tiny_llama(tmp_path / "other", seed=7), "lora": {"rank": 4}}
    stored = run_here(align_config(tiny_llama, preferences, **other), tmp_path / "stored")
    live = run_here(align_config(tiny_llama, preferences, **other, **LIVE), tmp_path / "live")
    assert_same(live, stored)
    assert abs(metrics(live)[0]["margin"]) > 1e-4


def objective_run(
    tiny_llama: Path, data: Path, objective: str, num_steps: int, **fields: Any
) -> AlignConfig:
    """Steps of 4 rows; 8 of them see 32."""
    fields |= {"objective": {"name": objective}, "num_steps": num_steps, "global_batch_size": 4}
    return align_config(tiny_llama, data, **fields)


def rows_in_steps(num_rows: int, num_steps: int, seed: int = 0) -> set[int]:
    """The rows of global batches of 4."""
    return {row for i in range(num_steps) for row in global_batch(num_rows, 4, i, seed)}


def rows_in_parts(reference: Path) -> list[int]:
    """The rows of all parts of a store, again where one has been computed again."""
    return [row for part in store_at(reference)._parts for row in part.rows.tolist()]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_only_rows_that_are_seen_are_computed(
    objective: str,
    tiny_llama: Path,
    preferences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the run's global batches, here of one row a pass; a longer run and one of another
    seed add theirs and no other, a shorter one none; no part changes, and each number is that of a
    run that sees all rows, to the last bit.
    """
    monkeypatch.setattr(reference_store, "MAX_ROWS", 1)
    run = partial(objective_run, tiny_llama, preferences, objective)
    every = reference_of(run(20), tmp_path / "every")
    num_rows = len(rows_of(every))
    assert num_rows == (40 if objective == "dpo" else 80)
    few, seen, standing = reference_of(run(3), tmp_path / "few"), rows_in_steps(num_rows, 3), []
    for number, (num_steps, seed) in enumerate([(3, 0), (5, 0), (2, 0), (3, 1)]):
        run_here(run(num_steps, seed=seed), tmp_path / "few" / str(number))
        seen |= rows_in_steps(num_rows, num_steps, seed)
        assert sorted(rows_in_parts(few)) == sorted(seen)
        assert bytes_of(few)[: len(standing)] == standing
        standing = bytes_of(few)
    assert len(seen) < num_rows
    assert_same_words(few, every, sorted(seen), rel=0)


def test_short_rows_bring_those_of_their_batch(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Batches are the same for every run, so its numbers do not depend on what was there."""
    fields = {"num_steps": 1, "global_batch_size": 1}
    alone = reference_of(align_config(tiny_llama, preferences, **fields), tmp_path / "alone")
    run_here(align_config(tiny_llama, preferences), tmp_path / "after" / "long")
    after = run_here(align_config(tiny_llama, preferences, **fields), tmp_path / "after" / "run")
    assert 1 < len(rows_of(alone)) < 40
    assert seeded_metrics(after) == seeded_metrics(tmp_path / "alone" / "run")
    (reference,) = (tmp_path / "after" / "cache").glob("reference-*")
    assert_same_words(alone, reference, rows_of(alone), rel=0)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_killed_computation_goes_on(
    objective: str,
    tiny_llama: Path,
    preferences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts that stand are not computed again, and the run ends with the bytes of one that was
    never disturbed; what was being written has no name that counts.
    """
    monkeypatch.setattr(reference_store, "MAX_ROWS", 3)
    config = objective_run(tiny_llama, preferences, objective, 7)
    whole = reference_of(config, tmp_path / "whole")
    num_rows = len(rows_of(whole))
    real, parts = reference_store.append_part, []

    def dying(folder: Path, part: reference_store.Part) -> None:
        if len(parts) == 2:
            (folder / ".part-00002.arrow.1.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        parts.append(part.rows.tolist())
        real(folder, part)

    monkeypatch.setattr(reference_store, "append_part", dying)
    (tmp_path / "run").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run_here(config, tmp_path / "run" / "run")
    record = json.loads((tmp_path / "run" / "run" / "reference.json").read_text())
    assert record == {"done": sum(map(len, parts)), "total": num_rows}
    monkeypatch.setattr(reference_store, "append_part", real)
    run_here(config, tmp_path / "run" / "run")
    (reference,) = (tmp_path / "run" / "cache").glob("reference-*")
    assert [part.rows.tolist() for part in store_at(reference)._parts][:2] == parts
    assert sorted(rows_in_parts(reference)) == rows_of(whole)
    assert_same_words(reference, whole, rows_of(whole), rel=0)
    weights = (tmp_path / place / "run" / WEIGHTS for place in ("run", "whole"))
    assert len({path.read_bytes() for path in weights}) == 1


def test_a_store_of_an_earlier_version_is_read(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of all rows, in the table's order: nothing is computed, and the run is the same."""
    config = objective_run(tiny_llama, preferences, "dpo", 12)
    reference = reference_of(config, tmp_path / "now")
    store, table = store_at(reference), store_at(reference).table
    rows = rows_of(reference)
    assert len(rows) == table.num_rows
    drawn = [store.drawn([row], torch.device("cpu")) for row in rows]
    for part in reference.glob("part-*"):
        part.unlink()
    columns = {f"column_{i}": column.numpy() for i, column in enumerate(store.values().T)}
    pq.write_table(pa.table(columns), reference / "log_probabilities.parquet")
    batch = pa.record_batch(
        {
            "token": torch.cat([each.ids for each in drawn]).int().numpy(),
            "log_probability": torch.cat([each.log_probability for each in drawn]).numpy(),
        }
    )
    with pa.ipc.new_file(str(reference / "drawn_tokens.arrow"), batch.schema) as file:
        file.write_batch(batch)
    monkeypatch.setattr("pipelines.train.reference.compute_reference", None)
    run_here(config, tmp_path / "now" / "again")
    one, other = (tmp_path / "now" / name for name in ("run", "again"))
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    assert seeded_metrics(one) == seeded_metrics(other)


def test_runs_that_add_at_the_same_time(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """None writes over the part of another."""
    config = objective_run(tiny_llama, preferences, "dpo", 2)
    reference = reference_of(config, tmp_path / "run")
    before = bytes_of(reference)
    parts = [
        replace(store_at(reference)._parts[0], values=np.full((1, 2), i, np.float32))
        for i in range(8)
    ]
    parts = [replace(part, rows=part.rows[:1], starts=part.starts[:2]) for part in parts]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(partial(reference_store.append_part, reference), parts))
    added = store_at(reference)._parts[len(before) :]
    assert {part.values[0, 0] for part in added} == set(range(8))
    assert bytes_of(reference)[: len(before)] == before


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero3"])
def test_workers_add_the_same_rows(
    strategy: str, tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Two workers in turns: the numbers of one, also where one is killed and all goes on."""
    alone = reference_of(objective_run(tiny_llama, preferences, "kto", 7), tmp_path / "alone")
    fields = {"strategy": strategy, "num_workers": 2, "micro_batch_size": 2}
    config = objective_run(tiny_llama, preferences, "kto", 7, **fields)
    run_workers(config, tmp_path / "both" / "run", kill_after=1)
    run_workers(config, tmp_path / "both" / "run")
    (both,) = (tmp_path / "both" / "cache").glob("reference-*")
    assert rows_of(both) == rows_of(alone)
    assert_same_words(both, alone, rows_of(alone))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "strategies"),
    [("weights", ["ddp", "fsdp2", "zero2", "zero3"]), ("adapters", ["ddp", "fsdp2"])],
)
def test_on_the_fly_under_each_sharding(
    way: str, strategies: list[str], tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """Two workers, with a frozen copy each or in shares, make the steps of one; so they do where
    the base of sharded adapters is the reference, between two passes that learn.
    """
    fields = LIVE | (WAYS["adapters"] if way == "adapters" else {})
    alone = run_here(align_config(tiny_llama, preferences, **fields), tmp_path / "alone")
    two = {"num_workers": 2, "micro_batch_size": 2}
    configs = {
        tmp_path / strategy: align_config(
            tiny_llama, preferences, **fields, strategy=strategy, **two
        )
        for strategy in strategies
    }
    run_workers_in_turn(configs)
    for run in configs:
        assert_same(run, alone)
