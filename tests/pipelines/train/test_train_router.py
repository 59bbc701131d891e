"""Router losses of mixtures of experts. Oracle: TRL's trainers and their gradients on the same
batch; for micro-batches, chunks and workers a run of one micro-batch.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from processes import run_workers_in_turn
from safetensors.torch import load_file
from training_files import align_config, metrics, preference_rows, run_here, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.config import load_config
from pipelines.errors import InputError
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.inputs import check_inputs
from tests.hub_models import save_as_on_hub

ASKED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
# A small step, of which rounding is a small part.
RUN: dict[str, Any] = {"optimizer": {"learning_rate": 1e-3, "eps": 1e-4}, "num_steps": 2}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral whose config asks for the loss."""
    return save_as_on_hub("mixtral", tmp_path_factory.mktemp("mixture") / "mixtral", **ASKED)


def trl_settings(folder: Path) -> dict[str, Any]:
    """A plain float32 batch of eight rows."""
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "per_device_train_batch_size": 8,
    }


def loss_and_norm(trainer: Any) -> tuple[float, float, float]:
    """TRL's loss, router loss and norm of the gradients on its batch."""
    model = trainer.model.eval()
    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return loss.item(), trainer._metrics["eval"]["aux_loss"][-1], norm.item()


def check_against(trainer: Any, run: Path) -> None:
    """The first step's numbers are TRL's."""
    loss, router, norm = loss_and_norm(trainer)
    first = metrics(run)[0]
    assert first["loss"] == pytest.approx(loss, rel=2e-6)
    assert first["router_loss"] == pytest.approx(router, rel=2e-6)
    assert first["gradient_norm"] == pytest.approx(norm, rel=1e-5)


def test_dpo_is_that_of_trl(mixture: Path, tmp_path: Path) -> None:
    """Mixtral: chosen and rejected responses together, without padding."""
    from trl import DPOConfig, DPOTrainer

    rows = preference_rows(8, seed=3)
    models = [AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32) for _ in range(2)]
    trainer = DPOTrainer(
        model=models[0],
        ref_model=models[1],
        args=DPOConfig(**trl_settings(tmp_path / "trl")),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(mixture),
    )
    config = align_config(mixture, write_rows(tmp_path / "rows.jsonl", rows), num_steps=1)
    check_against(trainer, run_here(config, tmp_path / "run"))


def test_sft_is_that_of_trl(tmp_path: Path) -> None:
    """Qwen3-MoE, with a weight of its own."""
    from trl import SFTConfig, SFTTrainer

    model = save_as_on_hub("qwen3_moe", tmp_path / "model", output_router_logits=False)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(8, seed=3)
    ]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(**trl_settings(tmp_path / "trl"), router_aux_loss_coef=0.2),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = align_config(model, data, num_steps=1, router_loss=0.2, objective={"name": "sft"})
    check_against(trainer, run_here(config, tmp_path / "run"))


def assert_same(one: Path, other: Path) -> None:
    """Two runs: each step's numbers, and the weights."""
    for now, before in zip(metrics(one), metrics(other), strict=True):
        for name in ("loss", "router_loss", "gradient_norm"):
            assert now[name] == pytest.approx(before[name], rel=1e-5), name
    expected = load_file(other / "model" / "model.safetensors")
    for name, tensor in load_file(one / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-6)


@pytest.fixture(scope="module")
def at_once(mixture: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one micro-batch."""
    place = tmp_path_factory.mktemp("at_once") / "run"
    return run_here(align_config(mixture, preferences, **RUN), place)


@pytest.mark.parametrize(
    "fields",
    [
        {"micro_batch_size": 2},
        {"logits_chunk": 7, "micro_batch_size": 4},
        {"gradient_checkpointing": True},
        {"reference_log_probabilities": "on_the_fly", "micro_batch_size": 1},
    ],
)
def test_passes_change_nothing(
    fields: dict[str, Any], at_once: Path, mixture: Path, preferences: Path, tmp_path: Path
) -> None:
    """The experts' shares are those of the global batch."""
    config = align_config(mixture, preferences, **RUN, **fields)
    assert_same(run_here(config, tmp_path / "run"), at_once)


def test_held_out_rows(mixture: Path, preferences: Path, tmp_path: Path) -> None:
    """Their loss has the shares of all of them, whatever is held: a batch of all is the oracle."""
    fields = RUN | {"evaluation": {"share": 0.25, "every": 2}}
    runs = [
        run_here(
            align_config(mixture, preferences, micro_batch_size=size, **fields),
            tmp_path / str(size),
        )
        for size in (8, 2)
    ]
    one, other = (metrics(run)[-1] for run in runs)
    assert one["eval_router_loss"] == pytest.approx(other["eval_router_loss"], rel=1e-5)
    assert 2 <= one["eval_router_loss"] < 4  # 2 of 4 experts: from equally busy to always the same


@pytest.mark.slow
def test_workers_change_nothing(
    at_once: Path, mixture: Path, preferences: Path, tmp_path: Path
) -> None:
    """Under every strategy, with one micro-batch and with two."""
    configs = {
        tmp_path / f"{strategy}-{size}": align_config(
            mixture, preferences, **RUN, strategy=strategy, num_workers=2, micro_batch_size=size
        )
        for strategy, size in (
            ("ddp", 2),
            ("fsdp2", 2),
            ("fsdp2", 4),
            ("zero1", 2),
            ("zero2", 4),
            ("zero3", 2),
        )
    }
    run_workers_in_turn(configs)
    for run in configs:
        assert_same(run, at_once)


def test_off_and_unasked(at_once: Path, mixture: Path, preferences: Path, tmp_path: Path) -> None:
    """Off is the loss without it, and so is a model that does not ask; they are other runs."""
    silent = save_as_on_hub("mixtral", tmp_path / "silent", output_router_logits=False)
    off = align_config(mixture, preferences, **RUN, router_loss="off")
    unasked = align_config(silent, preferences, **RUN)
    runs = [run_here(config, tmp_path / str(i)) for i, config in enumerate((off, unasked))]
    losses = [[line["loss"] for line in metrics(run)] for run in runs]
    assert losses[0] == losses[1]
    first = metrics(at_once)[0]
    assert first["loss"] - 0.5 * first["router_loss"] == pytest.approx(losses[0][0], rel=1e-6)
    assert "router_loss" not in metrics(runs[0])[0]
    asked = align_config(mixture, preferences, **RUN)
    keys = [plan_alignment(config, tmp_path / "cache").fingerprint for config in (off, asked)]
    assert keys[0] != keys[1]


def test_off_in_a_file(tmp_path: Path) -> None:
    """A bare `off` is false for YAML; what is neither name nor weight is refused."""
    path = tmp_path / "config.yml"
    path.write_text(
        "{model: m, data: d, optimizer: {learning_rate: 0.1},num_steps: 1, router_loss: off}"
    )
    assert load_config(path, AlignConfig).router_loss == "off"
    assert load_config(path, AlignConfig, ["router_loss=0.5"]).router_loss == 0.5
    for given, found in (("on", "True"), ("-1", "-1"), (".nan", "nan"), ("of", "'of'")):
        message = rf"router_loss: found {found}; allowed: 'auto', 'off' or a weight above 0$"
        with pytest.raises(InputError, match=message):
            load_config(path, AlignConfig, [f"router_loss={given}"])


def test_models_without_such_a_loss(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense model has no router; another loss than ours is found out."""
    for asked in ("off", 0.1):
        with pytest.raises(InputError) as caught:
            check_inputs(align_config(tiny_llama, preferences, router_loss=asked))
        assert str(caught.value) == (
            f"router_loss: found {asked} with model {tiny_llama}, which has no router with a loss; "
            "allowed: auto"
        )
    model = save_as_on_hub("mixtral", tmp_path / "model", **ASKED)
    monkeypatch.setattr(
        "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func",
        lambda logits, *_: logits[0].mean(),
    )
    with pytest.raises(InputError) as caught:
        run_here(align_config(model, preferences), tmp_path / "run")
    assert str(caught.value) == (
        f"router_loss: {model} has no router loss, or another than E sum f P; allowed: off"
    )
