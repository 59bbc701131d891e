"""Several rows in one sequence. Oracles: the same rows in sequences of their own, and TRL."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from training_files import align_config, metrics, preference_rows, run_here, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipelines.errors import InputError
from pipelines.train.data import PAD, TokenSettings, TokenTable, collate, pack, token_table
from pipelines.train.objective_config import ObjectiveConfig
from pipelines.train.objectives import logits_of, responses_under, shares_of, text_loss
from pipelines.train.packing import check_packing, check_rows_apart
from tests.model_kinds import KINDS

SFT: dict[str, Any] = {"objective": {"name": "sft"}, "max_length": 40}
CPU = torch.device("cpu")
APART = KINDS["decoder"]
JOINED = {
    **KINDS["state space"],
    "Qwen3NextForCausalLM": (
        "qwen3_next",
        KINDS["decoder"]["Qwen3ForCausalLM"][1] | {"layer_types": ["linear_attention"] * 2},
    ),
}


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{"messages": row["prompt"] + row["chosen"]} for row in preference_rows(count, seed)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(16))


@pytest.fixture(scope="module")
def table(tiny_llama: Path, data: Path) -> TokenTable:
    return table_of(data, tiny_llama, data.parent)


def table_of(data: Path, model: Path, cache: Path) -> TokenTable:
    return token_table(data, None, TokenSettings(str(model), "texts", 40, "error"), cache)[0]


@given(rows=st.lists(st.integers(0, 15), min_size=1, max_size=12), limit=st.integers(0, 30))
def test_every_token_is_there_once(table: TokenTable, rows: list[int], limit: int) -> None:
    """Within the limit, in no more room than with padding, each row from position 0 on."""
    limit += int(table.lengths.max())
    batch, plain = pack(table, rows, PAD, limit, CPU), collate(table, rows, PAD, CPU)
    assert batch.ids.numel() <= plain.ids.numel() and batch.ids.shape[1] <= limit
    if batch.packed is None:
        assert torch.equal(batch.ids, plain.ids)
        return
    covered = torch.zeros_like(batch.ids)
    for row, (sequence, first, last) in zip(rows, batch.packed.places, strict=True):
        ids, marks = table.sequences(row)[0]
        assert batch.ids[sequence, first:last].tolist() == ids.tolist()
        assert batch.response[sequence, first:last].tolist() == marks.tolist()
        assert batch.packed.positions[sequence, first:last].tolist() == list(range(len(ids)))
        covered[sequence, first:last] += 1
    assert covered.max() == 1 and not batch.response[covered == 0].any()
    starts = batch.packed.positions[:, 1:] - batch.packed.positions[:, :-1] != 1
    assert starts.sum() >= len(rows) - len(batch.ids)  # none is a continuation of another


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_row_sees_another(attention: str, tiny_llama: Path, table: TokenTable) -> None:
    """Responses and gradients are those of rows with sequences of their own, weighted or not."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.float32, attn_implementation=attention
    )
    rows, found = list(range(12)), []
    for batch in (pack(table, rows, PAD, 40, CPU), collate(table, rows, PAD, CPU)):
        responses = responses_under(logits_of(model, batch), batch)
        weights = torch.arange(1.0, 13.0)
        loss = text_loss(ObjectiveConfig(name="sft"), responses, shares_of(table, rows), weights)
        model.zero_grad()
        loss.loss.backward()
        found.append((batch, responses, [p.grad.clone() for p in model.parameters()]))
    (packed, one, mine), (_, other, theirs) = found
    assert packed.packed is not None and len(packed.ids) < 12
    torch.testing.assert_close(one.log_probability, other.log_probability, rtol=1e-6, atol=1e-6)
    assert torch.equal(one.num_tokens, other.num_tokens)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_of_trl(tiny_llama: Path, tmp_path: Path) -> None:
    """On a batch that TRL packs, of conversations whose answers are learned."""
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(8, 3)]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        args=SFTConfig(
            str(tmp_path),
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            per_device_train_batch_size=8,
            packing=True,
            max_length=40,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() == 8
    data = write_rows(tmp_path / "rows.jsonl", rows)
    table = token_table(data, None, TokenSettings(str(tiny_llama), "texts", 40, "error"), tmp_path)[
        0
    ]
    model, eight = trainer.model.eval(), list(range(8))
    with torch.no_grad():
        theirs = trainer.compute_loss(model, batch).item()
        ours = pack(table, eight, PAD, 400, CPU)
        responses = responses_under(logits_of(model, ours), ours)
        shares = shares_of(table, eight)
        loss = text_loss(ObjectiveConfig(name="sft"), responses, shares).loss.item()
    assert ours.packed is not None
    assert loss == pytest.approx(theirs, rel=2e-6)


def test_a_run_with_packing(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    """The steps of the run without, held-out rows too; in bf16 nearly."""
    fields = SFT | {"evaluation": {"share": 0.25, "every": 2}, "num_steps": 3}
    fields |= {"optimizer": {"learning_rate": 1e-3, "eps": 1e-3}}
    plain = run_here(align_config(tiny_llama, data, **fields), tmp_path / "plain")
    packed = run_here(align_config(tiny_llama, data, **fields, packing=True), tmp_path / "packed")
    half = align_config(tiny_llama, data, **fields, packing=True, precision="bf16")
    halves = run_here(half, tmp_path / "bf16")
    for one, other, near in zip(*map(metrics, (plain, packed, halves)), strict=True):
        for key in {"loss", "gradient_norm", "eval_loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
            assert near[key] == pytest.approx(one[key], rel=0.03), key
    weights = [load_file(run / "model" / "model.safetensors") for run in (plain, packed)]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", APART)
def test_attention_is_cut(kind: str) -> None:
    """By the architecture, and by its logits."""
    model = model_of(*APART[kind])
    check_packing(model)
    check_rows_apart(model, 64, "float32", CPU)


@pytest.mark.parametrize("kind", JOINED)
def test_what_cannot_be_cut(kind: str) -> None:
    """Known by its modules; and where they have other names, by its logits."""
    model = model_of(*JOINED[kind])
    with pytest.raises(InputError, match=rf"^packing: found {kind}, whose .* allowed .*: false$"):
        check_packing(model)
    if kind != "RwkvForCausalLM":  # takes no positions at all
        with pytest.raises(InputError, match=rf"^packing: {kind} lets a row see the row before it"):
            check_rows_apart(model, 64, "float32", CPU)


def test_attention_that_is_not_cut() -> None:
    """gpt-oss in transformers 5.19 takes positions, but its masks do not read them."""
    model = model_of(*KINDS["mixture of experts"]["GptOssForCausalLM"])
    check_packing(model)
    with pytest.raises(
        InputError, match="packing: GptOssForCausalLM lets a row see the row before"
    ):
        check_rows_apart(model, 64, "float32", CPU)


def model_of(model_type: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    if model_type == "gpt_oss":
        fields = fields | {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(model_type, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


def test_other_objectives_refuse_it() -> None:
    with pytest.raises(ValueError, match="packing: found objective dpo; allowed with: sft"):
        align_config(Path("m"), Path("r"), packing=True)
    with pytest.raises(ValueError, match=r"packing: found objective dpo \+ sft; allowed"):
        align_config(Path("m"), Path("r"), packing=True, objective={"name": ["dpo", "sft"]})
