"""Objectives against TRL and against float64, on the same model and the same batch.

Oracle: TRL, and the papers' formulas in float64.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from training_files import preference_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.train.data import (
    TokenSettings,
    TokenTable,
    collate,
    collate_mismatched,
    token_table,
)
from pipelines.train.objective_config import ObjectiveConfig
from pipelines.train.objectives import (
    labelled_loss,
    mismatched_point,
    pair_loss,
    score_responses,
    shares_of,
    text_loss,
)
from tests.tiny_models import save_tiny_llama

ROWS = list(range(8))
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def reference_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference that differs from the policy, so that no log-ratio is 0."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "reference", seed=5)


@pytest.fixture(scope="module")
def tables(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TokenTable]:
    """Eight preferences as tokens, of each kind of row."""
    folder = tmp_path_factory.mktemp("tables")
    data = write_rows(folder / "rows.jsonl", preference_rows(8, seed=3))

    def make(kind: str) -> TokenTable:
        return token_table(data, None, TokenSettings(str(tiny_llama), kind, 64, "error"), folder)[0]

    return make


def quiet(folder: Path) -> dict[str, Any]:
    """TRL's settings for a plain float32 run that reports to nobody."""
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "beta": 0.3,
    }


def our_pair_loss(table: TokenTable, model: Any, reference: Any, **objective: Any) -> float:
    """Our loss of the whole batch."""
    config = ObjectiveConfig(**objective)
    batch = collate(table, ROWS, 0, "cpu")
    with torch.no_grad():
        before = score_responses(reference, batch).log_probability.view(2, -1).T
        result = pair_loss(
            config,
            score_responses(model, batch),
            before if config.definition.uses_reference else None,
            shares_of(table, ROWS),
        )
    return result.loss.item()


@pytest.fixture(scope="module")
def dpo(tiny_llama: Path, reference_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's DPO trainer on the rows, with its own batch."""
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(reference_path, dtype=torch.float32),
        args=DPOConfig(**quiet(tmp_path_factory.mktemp("trl"))),
        train_dataset=Dataset.from_list(preference_rows(8, seed=3)),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    trainer.model.eval()
    return trainer


def test_tokens_are_those_of_trl(dpo: Any, tables: Callable[[str], TokenTable]) -> None:
    """Prompts, responses and where they part."""
    table = tables("pairs")
    for row, theirs in enumerate(dpo.train_dataset):
        for (ids, marks), name in zip(
            table.sequences(row), ("chosen_ids", "rejected_ids"), strict=True
        ):
            assert ids.tolist() == theirs["prompt_ids"] + theirs[name]
            assert marks.tolist() == [0] * len(theirs["prompt_ids"]) + [1] * len(theirs[name])


@pytest.mark.parametrize(
    ("name", "loss_types", "weights", "parameters"),
    [
        ("dpo", ["sigmoid"], None, {}),
        ("dpo", ["sigmoid", "sft"], [1.0, 0.6], {"rpo_alpha": 0.6}),
        ("hinge", ["hinge"], None, {}),
        ("ipo", ["ipo"], None, {}),
        ("robust", ["robust"], None, {"label_smoothing": 0.2}),
        ("apo_zero", ["apo_zero"], None, {}),
        ("apo_down", ["apo_down"], None, {}),
        ("bco_pair", ["bco_pair"], None, {}),
        (["dpo", "bco_pair", "sft"], ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.3], {}),
        (
            ["sft", "ipo", "robust", "hinge"],
            ["sft", "ipo", "robust", "hinge"],
            [0.4, 0.1, 0.7, 2.0],
            {"label_smoothing": 0.3},
        ),
        (["apo_down", "apo_zero"], ["apo_down", "apo_zero"], None, {}),
    ],
)
def test_pairs_with_reference(
    dpo: Any,
    tables: Callable[[str], TokenTable],
    name: str | list[str],
    loss_types: list[str],
    weights: list[float] | None,
    parameters: dict[str, float],
) -> None:
    """Each loss, DPO with the likelihood term, and sums with and without weights."""
    dpo.loss_types, dpo.loss_weights = loss_types, weights or [1.0] * len(loss_types)
    dpo.label_smoothing = parameters.get("label_smoothing", 0.0)
    given = {} if isinstance(name, str) else {"loss_weights": weights}
    batch = dpo.data_collator(list(dpo.train_dataset))
    with torch.no_grad():
        theirs = dpo.compute_loss(dpo.model, batch).item()
    ours = our_pair_loss(
        tables("pairs"), dpo.model, dpo.ref_model, name=name, beta=0.3, **given, **parameters
    )
    assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_kto(
    dpo: Any,
    tables: Callable[[str], TokenTable],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """KTO with weights; both take z0 from the same mismatched responses."""
    from trl import KTOConfig, KTOTrainer

    table = tables("labelled")
    rows = list(range(table.num_rows))
    examples = []
    for row in rows:
        ids, marks = table.sequences(row)[0]
        swapped, learned = table.mismatched(row)
        first = int(marks.argmax())
        examples.append(
            {
                "prompt_ids": ids[:first].tolist(),
                "completion_ids": ids[first:].tolist(),
                "KL_completion_ids": swapped[int(learned.argmax()) :].tolist(),
                "label": bool(table.labels[row]),
            }
        )
    messages = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in preference_rows(8, seed=3)
        for name in ("chosen", "rejected")
    ]
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        ref_model=dpo.ref_model,
        args=KTOConfig(**quiet(tmp_path), desirable_weight=1.2, undesirable_weight=0.7),
        train_dataset=Dataset.from_list(messages),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    trainer.model.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, trainer.data_collator(examples)).item()

    config = ObjectiveConfig(name="kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    batch, mismatched = (f(table, rows, 0, "cpu") for f in (collate, collate_mismatched))
    with torch.no_grad():
        point = mismatched_point(
            lambda: score_responses(trainer.model, mismatched).log_probability,
            score_responses(dpo.ref_model, mismatched).log_probability,
            lambda total: total,
            len(rows),
        )
        ours = labelled_loss(
            config,
            score_responses(trainer.model, batch),
            score_responses(dpo.ref_model, batch).log_probability,
            torch.from_numpy(table.labels),
            point,
            shares_of(table, rows),
        )
    assert ours.loss.item() == pytest.approx(theirs, rel=TOLERANCE)


def mask_of(table: TokenTable, rows: list[int]) -> torch.Tensor:
    """1 for tokens and 0 for padding, of all rows' first sequences and then all their second ones:
    our own passes do without.
    """
    lengths = torch.from_numpy(table.lengths[rows].T.reshape(-1))
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


def batch_of_trl(table: TokenTable) -> dict[str, torch.Tensor]:
    """The rows as TRL's experimental trainers take them."""
    both, masks = collate(table, ROWS, 0, "cpu"), mask_of(table, ROWS)
    batch = {}
    for name, rows in (("chosen", slice(len(ROWS))), ("rejected", slice(len(ROWS), None))):
        batch[f"{name}_input_ids"] = both.ids[rows]
        batch[f"{name}_attention_mask"] = masks[rows]
        batch[f"{name}_labels"] = both.ids[rows].masked_fill(both.response[rows] == 0, -100)
    return batch


def loss_and_numbers(trainer: Any, dpo: Any, table: TokenTable) -> tuple[float, dict[str, float]]:
    """Of one of TRL's experimental trainers, with its own forward pass."""
    trainer.accelerator = dpo.accelerator
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    with torch.no_grad():
        loss, numbers = trainer.get_batch_loss_metrics(dpo.model, batch_of_trl(table))
    return loss.item(), numbers


def test_simpo(dpo: Any, tables: Callable[[str], TokenTable]) -> None:
    """SimPO is CPO of TRL without its likelihood term."""
    from trl.experimental.cpo import CPOTrainer

    trainer = object.__new__(CPOTrainer)  # which would tokenise for itself
    trainer.loss_type, trainer.beta, trainer.simpo_gamma = "simpo", 0.3, 0.5
    trainer.cpo_alpha, trainer.alpha, trainer.label_smoothing = 0.0, 0.0, 0.0
    trainer.pad_token_id = 0
    theirs, numbers = loss_and_numbers(trainer, dpo, tables("pairs"))
    ours = our_pair_loss(
        tables("pairs"), dpo.model, dpo.ref_model, name="simpo", beta=0.3, simpo_gamma=0.5
    )
    assert numbers["rewards/margins"] != 0
    assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_orpo(dpo: Any, tables: Callable[[str], TokenTable]) -> None:
    """ORPO's odds ratio is TRL's; its likelihood runs over chosen responses alone (TRL's runs over
    their prompts too), which the model's own cross entropy gives.
    """
    from trl.experimental.orpo import ORPOTrainer

    table = tables("pairs")
    trainer = object.__new__(ORPOTrainer)  # which would tokenise for itself
    trainer.beta, trainer.padding_value = 0.3, 0
    theirs, numbers = loss_and_numbers(trainer, dpo, table)
    batch = batch_of_trl(table)
    chosen = {name: batch[f"chosen_{name}"] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        likelihood = dpo.model(**chosen).loss.item()
    ours = our_pair_loss(table, dpo.model, dpo.ref_model, name="orpo", beta=0.3)
    assert ours == pytest.approx(theirs - numbers["nll_loss"] + likelihood, rel=TOLERANCE)


def summed_in_float64(table: TokenTable, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs, 2): log-probabilities of both responses, and their tokens; in float64, one sequence
    at a time, by the definition.
    """
    exact, sums, counts = AutoModelForCausalLM.from_pretrained(path).double(), [], []
    for row in ROWS:
        for ids, marks in table.sequences(row):
            tokens = torch.tensor(ids.tolist())
            with torch.no_grad():
                logits = exact(input_ids=tokens[None]).logits[0]
            chances = logits.log_softmax(-1)[torch.arange(len(ids) - 1), tokens[1:]]
            learned = torch.tensor(marks[1:].tolist()).bool()
            sums.append(chances[learned].sum())
            counts.append(learned.sum())
    return torch.stack(sums).view(-1, 2), torch.stack(counts).view(-1, 2)


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "simpo", "orpo"])
def test_pairs_in_float64(
    name: str,
    dpo: Any,
    tables: Callable[[str], TokenTable],
    tiny_llama: Path,
    reference_path: Path,
) -> None:
    """The whole loss, likelihood terms and smoothing among it, written out from the papers."""
    table, beta = tables("pairs"), 0.3
    now, counts = summed_in_float64(table, tiny_llama)
    before, _ = summed_in_float64(table, reference_path)
    margin = ((now - before) @ torch.tensor([1.0, -1.0]).double()).numpy()
    means = now / counts
    likelihood = -now[:, 0].sum() / counts[:, 0].sum()
    more: dict[str, float] = {}
    if name == "dpo":
        more = {"label_smoothing": 0.2, "rpo_alpha": 0.7}
        sigmoid = 1 / (1 + np.exp(-beta * margin))
        expected = np.mean(-0.8 * np.log(sigmoid) - 0.2 * np.log(1 - sigmoid)) + 0.7 * likelihood
    elif name == "ipo":
        ratio = (now - before) / counts
        expected = ((ratio[:, 0] - ratio[:, 1] - 1 / (2 * beta)) ** 2).mean()
    elif name == "hinge":
        expected = np.maximum(0, 1 - beta * margin).mean()
    elif name == "simpo":
        more = {"simpo_gamma": 0.5}
        difference = beta * (means[:, 0] - means[:, 1]) - 0.5
        expected = -(1 / (1 + (-difference).exp())).log().mean()
    else:
        odds = means.exp() / (1 - means.exp())
        ratio = odds[:, 0] / odds[:, 1]
        expected = likelihood - beta * (ratio / (1 + ratio)).log().mean()
    ours = our_pair_loss(table, dpo.model, dpo.ref_model, name=name, beta=beta, **more)
    assert ours == pytest.approx(float(expected), rel=TOLERANCE)


def test_sft(tiny_llama: Path, tmp_path: Path) -> None:
    """Mean over completions' tokens: TRL's on its own batch, and float64 by hand."""
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(8, seed=3)
    ]
    settings = {name: value for name, value in quiet(tmp_path).items() if name != "beta"}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    model = trainer.model.eval()
    data = write_rows(tmp_path / "rows.jsonl", rows)
    token_settings = TokenSettings(str(tiny_llama), "texts", 64, "error")
    table = token_table(data, None, token_settings, tmp_path)[0]
    config = ObjectiveConfig(name="sft")
    batch = collate(table, ROWS, 0, "cpu")
    with torch.no_grad():
        theirs = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))).item()
        shares = shares_of(table, ROWS)
        ours = text_loss(config, score_responses(model, batch), shares).loss.item()
        logits = model(input_ids=batch.ids, attention_mask=mask_of(table, ROWS)).logits.double()
    chances = logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    by_hand = -chances[batch.response[:, 1:].bool()].mean().item()
    assert ours == pytest.approx(by_hand, rel=TOLERANCE)
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
