"""Models that read ahead are refused at the start of a run.

Oracle: BERT's class of causal language models, which reads ahead unless its config says that it is
a decoder.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_workers
from torch.multiprocessing import ProcessRaisedException
from training_files import align_config, metrics, run_here
from transformers import BertConfig, BertLMHeadModel

from pipelines.errors import InputError
from pipelines.train import plan_alignment
from pipelines.train.causality import check_reads_back
from pipelines.train.data import TokenTable
from pipelines.train.errors import raise_failure
from tests.tiny_models import tiny_tokenizer

LINE = "model: found BertLMHeadModel, in which a token sees later ones of its row"
CPU = torch.device("cpu")


def save_bert(path: Path, *, is_decoder: bool) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,  # so that attention is seen above bf16's rounding
        is_decoder=is_decoder,
    )
    BertLMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_run_stops_at_its_start(preferences: Path, tmp_path: Path) -> None:
    """Before the reference and the first step; the same class is trained as a decoder."""
    ahead, back = (
        save_bert(tmp_path / str(is_decoder), is_decoder=is_decoder) for is_decoder in (False, True)
    )
    with pytest.raises(InputError, match=LINE):
        run_here(align_config(ahead, preferences, num_steps=1), tmp_path / "ahead" / "run")
    assert not list((tmp_path / "ahead").rglob("reference*"))
    run = run_here(align_config(back, preferences, num_steps=1), tmp_path / "back" / "run")
    assert len(metrics(run)) == 1


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_test(precision: str, preferences: Path, tmp_path: Path) -> None:
    """It draws no random number and works on the shortest rows, of one repeated token too."""
    table = plan_alignment(
        align_config(save_bert(tmp_path / "m", is_decoder=True), preferences), tmp_path / "cache"
    ).table
    short = Short()
    for is_decoder in (True, False):
        model = BertLMHeadModel.from_pretrained(
            save_bert(tmp_path / str(is_decoder), is_decoder=is_decoder)
        ).eval()
        model = model.bfloat16() if precision == "bf16" else model
        before = torch.get_rng_state()
        for rows in (table, short):
            if is_decoder:
                check_reads_back(model, rows, precision, CPU)
            else:
                with pytest.raises(InputError, match=LINE):
                    check_reads_back(model, rows, precision, CPU)
        assert torch.equal(torch.get_rng_state(), before)


class Short(TokenTable):
    """One row of one token, twice."""

    def __init__(self) -> None:
        self.lengths = np.array([[2]])

    def sequences(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.array([0, 0], np.int32), np.array([0, 1], np.uint8))]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_workers_stop_too(strategy: str, preferences: Path, tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model", is_decoder=False)
    config = align_config(model, preferences, strategy=strategy, num_workers=2)
    with pytest.raises(ProcessRaisedException, match=LINE):
        run_workers(config, tmp_path / "run")
    with pytest.raises(InputError, match=f"^{LINE}"):
        raise_failure(tmp_path / "run")
