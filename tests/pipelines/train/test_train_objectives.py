"""Every objective trains, and neither micro-batches nor the reference's place change a run.

Oracle: losses known before the first step, and transformers' log-probabilities.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_files import (
    align_config,
    metrics,
    preference_rows,
    run_here,
    stop_at_the_fourth_step,
    write_rows,
)
from transformers import AutoModelForCausalLM

from operators.losses import OBJECTIVES
from pipelines.errors import InputError
from pipelines.train import plan_alignment
from pipelines.train.data.batches import pad_together
from pipelines.train.objectives import logits_of
from tests.tiny_models import save_tiny_llama

SUM = ["ipo", "dpo", "sft"]
EXTRA: dict[str, dict[str, Any]] = {
    "dpo": {"label_smoothing": 0.1, "rpo_alpha": 0.5},
    "robust": {"label_smoothing": 0.1},
    "kto": {"desirable_weight": 1.5},
    "simpo": {"simpo_gamma": 0.3},
    str(SUM): {"loss_weights": [0.01, 1.0, 0.3]},
}


@pytest.fixture(scope="session")
def any_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that serve every objective: pairs with a whole conversation beside them."""
    rows = [row | {"messages": row["prompt"] + row["chosen"]} for row in preference_rows(24)]
    return write_rows(tmp_path_factory.mktemp("data") / "any.jsonl", rows)


@pytest.mark.parametrize("name", [*OBJECTIVES, SUM], ids=str)
def test_objective_learns(
    name: str | list[str], tiny_llama: Path, any_rows: Path, tmp_path: Path
) -> None:
    """The loss falls, all tensors move, and micro-batches of any size give the same steps."""
    objective = {"name": name, **EXTRA.get(str(name), {})}
    fields: dict[str, Any] = {
        "objective": objective,
        "num_steps": 8,
        "checkpoint_every": 8,
        "schedule": "constant",
        "optimizer": {"learning_rate": 3e-3},
    }
    whole = run_here(align_config(tiny_llama, any_rows, **fields), tmp_path / "whole")
    lines = metrics(whole)
    assert lines[-1]["loss"] < lines[0]["loss"] * 0.999
    cut = run_here(
        align_config(tiny_llama, any_rows, **fields, micro_batch_size=2), tmp_path / "cut"
    )
    for one, other in zip(lines, metrics(cut), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=5e-6)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=5e-5)
    before = load_file(tiny_llama / "model.safetensors")
    after = load_file(whole / "model" / "model.safetensors")
    heads = {"lm_head.weight", "score.weight"} if name == "reward" else set()
    assert before.keys() ^ after.keys() == heads
    shared = before.keys() & after.keys()
    assert not any(torch.equal(before[key], after[key]) for key in shared)


def test_first_steps_have_known_losses(tiny_llama: Path, any_rows: Path, tmp_path: Path) -> None:
    """Where policy and reference are one, the margin is 0 and z0 too."""
    known = {"dpo": 0.6931472, "robust": 0.6931472, "hinge": 1.0, "ipo": 25.0, "kto": 0.5}
    known = {"apo_zero": 1.0, "apo_down": 1.0, "bco_pair": 1.3862944, **known}
    for name, value in known.items():
        config = align_config(tiny_llama, any_rows, objective={"name": name}, num_steps=1)
        (line,) = metrics(run_here(config, tmp_path / name))
        assert line["loss"] == pytest.approx(value, rel=1e-6), name
    assert line["kl"] == pytest.approx(0, abs=1e-6)


def test_reference_is_computed_once(
    tiny_llama: Path, any_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later run on the same model and data reads it; an objective of other rows does not."""
    from pipelines.train import reference

    computed = []
    real = reference.compute_reference
    monkeypatch.setattr(
        reference, "compute_reference", lambda *a, **k: (computed.append(1), real(*a, **k))[1]
    )
    for number, name in enumerate(("dpo", "ipo", "hinge", "kto")):
        config = align_config(tiny_llama, any_rows, objective={"name": name}, num_steps=1)
        run_here(config, tmp_path / f"run-{number}")
    assert len(computed) == 2
    assert len(list((tmp_path / "cache").glob("reference-*/part-00000.arrow"))) == 2


@pytest.mark.parametrize("tau", ["zero_rows", "exclude", "error"])
def test_a_reference_without_the_tokens_added_since(
    tau: str, tiny_llama: Path, any_rows: Path, tmp_path: Path
) -> None:
    """New rows have no tau: they are taken as zero, their tensors let through, or refused."""
    smaller = {}
    for name, seed in (("base", 9), ("tuned", 10)):
        model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "made", seed=seed))
        model.resize_token_embeddings(model.config.vocab_size - 2)
        model.save_pretrained(tmp_path / name)
        smaller[name] = tmp_path / name
    optimizer = {
        "name": "ondare",
        "learning_rate": 1e-3,
        "density": 1.0,
        "alpha": 0.5,
        "tau": smaller,
        "missing_delta": tau,
    }
    config = align_config(tiny_llama, any_rows, optimizer=optimizer, num_steps=1)
    if tau == "error":
        with pytest.raises(InputError, match=r"^optimizer\.tau: '.*' has shape \(45, 32\); the p"):
            run_here(config, tmp_path / "run")
        return
    folder = run_here(config, tmp_path / "run")
    name = "model.embed_tokens.weight"
    files = (tiny_llama, *smaller.values(), folder / "model")
    before, base, tuned, after = (load_file(p / "model.safetensors")[name] for p in files)
    moved = (after - before).abs().max(1).values
    drift = 0.5 * (tuned - base).abs().max(1).values
    assert (moved[-2:] < 2e-3).all()
    assert ((moved[:-2] > drift - 2e-3) if tau == "zero_rows" else (moved[:-2] < 2e-3)).all()


@pytest.mark.parametrize("consensus", ["ondare", "onties"])
def test_online_merging_resumes_exactly(
    consensus: str,
    tiny_llama: Path,
    any_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masks, thresholds, moments and the anchor of step-K go on as if nothing had happened."""
    from training_files import seeded_metrics

    base = save_tiny_llama(tmp_path / "base", seed=9)
    optimizer = {
        "name": consensus,
        "learning_rate": 1e-3,
        "density": 0.5,
        "alpha": 1e-3,
        "merge_every": 3,
        "tau": {"base": base, "tuned": tiny_llama},
    }
    config = align_config(tiny_llama, any_rows, optimizer=optimizer, num_steps=5)
    whole = run_here(config, tmp_path / "whole")
    stop_at_the_fourth_step(config, tmp_path / "broken", monkeypatch)
    broken = run_here(config, tmp_path / "broken")
    assert seeded_metrics(broken) == seeded_metrics(whole)
    file = "model/model.safetensors"
    assert (broken / file).read_bytes() == (whole / file).read_bytes()
    assert "tau_cosine" in metrics(whole)[-1]


def test_another_reference_model(tiny_llama: Path, any_rows: Path, tmp_path: Path) -> None:
    """The first loss is that of the two models' log-probabilities, computed by transformers."""
    other = save_tiny_llama(tmp_path / "other", seed=4)
    config = align_config(
        tiny_llama, any_rows, reference_model=other, num_steps=1, global_batch_size=24
    )
    ran = run_here(config, tmp_path / "run")
    rows = plan_alignment(config, tmp_path / "cache").table
    sums = []
    for path in (tiny_llama, other):
        model = AutoModelForCausalLM.from_pretrained(path)
        values = torch.zeros(24, 2)
        for row in range(24):
            for column, (ids, marks) in enumerate(rows.sequences(row)):
                tokens = torch.tensor(ids.tolist())
                with torch.no_grad():
                    logits = model(tokens[None]).logits[0, :-1].log_softmax(-1)
                chosen = logits[range(len(tokens) - 1), tokens[1:]]
                values[row, column] = chosen[torch.tensor(marks.tolist())[1:] == 1].sum()
        sums.append(values[:, 0] - values[:, 1])
    expected = -torch.nn.functional.logsigmoid(0.1 * (sums[0] - sums[1])).mean().item()
    assert metrics(ran)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_logits_are_those_of_a_whole_masked_pass(tiny_llama: Path, any_rows: Path) -> None:
    """Without a mask for the padding, and without the logits of prompts: the same, for Llama and
    for an architecture that cannot leave logits out.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    prompt, lengths = np.full(9, 5, np.int32), (4, 1, 7)
    rows = []
    for length in lengths:
        ids = np.concatenate([prompt, np.arange(6, 6 + length, dtype=np.int32)])
        rows.append((ids, (np.arange(len(ids)) >= 9).astype(np.uint8)))
    batch = pad_together(rows, 0, "cpu")
    mask = torch.stack([torch.arange(16) < 9 + length for length in lengths]).long()

    class Whole(torch.nn.Module):
        """Always gives all logits."""

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return model(input_ids=input_ids, use_cache=use_cache)

    with torch.no_grad():
        expected = model(input_ids=batch.ids, attention_mask=mask).logits[:, 8:]
        found, other = logits_of(model, batch), logits_of(Whole(), batch)
    assert found.shape == other.shape == expected.shape
    tokens = mask[:, 8:].bool()
    assert torch.allclose(found[tokens], expected[tokens], rtol=1e-5, atol=1e-6)
    assert torch.allclose(other[tokens], expected[tokens], rtol=1e-5, atol=1e-6)
