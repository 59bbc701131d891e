"""DPO steps of Poise beside TRL's: the same model, rows and batch, float32, one thread.

    python benchmarks/training.py --steps 40

Builds the data of the tiny world's rich size and a model with random weights (which does not change
the times), trains it with both tools and prints a Markdown table: the median time of a step after
the first ten. Poise runs as fsdp2 with one worker, as single, and as single with logits by chunks.
TRL runs with reference log-probabilities computed in advance, as Poise does, and with its default,
a reference model in each step. The two tools take turns, so that a busy machine slows both.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.tiny_world import build_world
from pipelines.tiny_world.sizes import SIZES
from pipelines.tiny_world.training import HEAD_SIZE
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.loop import train_worker
from pipelines.train.run import worker_settings
from ray_jobs.session import quiet_environment

WARM_UP = 10
TRL = (("reference beforehand", True), ("default", False))
CHUNK = 256  # positions; a step has over 2,000
BATCH, BETA, LEARNING_RATE = 32, 0.1, 2e-5


def make_model(world: Path, path: Path) -> None:
    """The rich size with random weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    size = SIZES["rich"]
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.hidden_size * 8 // 3,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // HEAD_SIZE,
        num_key_value_heads=size.hidden_size // HEAD_SIZE,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def poise_steps(
    model: Path, data: Path, folder: Path, strategy: str, steps: int, chunk: int | None = None
) -> list[float]:
    """Seconds of each step of Poise, from its metrics.

    Args:
        chunk: positions whose logits exist at once.
    """
    config = AlignConfig(
        model=model,
        data=data,
        objective={"name": "dpo", "beta": BETA},
        optimizer={"learning_rate": LEARNING_RATE},
        num_steps=steps,
        global_batch_size=BATCH,
        strategy=strategy,
        num_workers=1,
        logits_chunk=chunk,
        checkpoint_every=10**6,
    )
    folder.mkdir()
    cache = folder.parent / "cache"
    settings = worker_settings(config, plan_alignment(config, cache), folder, cache)
    train_worker({"runs": [settings | {"num_threads": 1}]})
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines][WARM_UP:-1]  # the last one saves too


def trl_steps(model: Path, data: Path, folder: Path, beforehand: bool, steps: int) -> list[float]:
    """Seconds between the ends of TRL's steps."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    ends: list[float] = []

    class Clock(TrainerCallback):
        """Notes when steps end."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(folder),
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            beta=BETA,
            precompute_ref_log_probs=beforehand,
            logging_steps=10**6,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Clock()],
    )
    trainer.train()
    return [after - before for before, after in itertools.pairwise(ends)][WARM_UP:]


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="without TRL")
    arguments = parser.parse_args()
    quiet_environment()  # no library uses the network
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_world(folder / "world", 0, "rich")
        data = folder / "world" / "data" / "preferences" / "mixture.jsonl"
        model = folder / "model"
        make_model(folder / "world", model)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for number in range(arguments.rounds):
            for strategy, chunk in (("fsdp2", None), ("single", None), ("single", CHUNK)):
                place = folder / f"{strategy}-{chunk}-{number}"
                times = poise_steps(model, data, place, strategy, arguments.steps, chunk)
                label = f"Poise, {strategy}" + (f", logits_chunk {chunk}" if chunk else "")
                found.setdefault(label, []).extend(times)
            for label, beforehand in () if arguments.alone else TRL:
                times = trl_steps(
                    model, data, folder / f"{label}-{number}", beforehand, arguments.steps
                )
                found.setdefault(f"TRL, {label}", []).extend(times)
        dist.destroy_process_group()
    ours = statistics.median(found["Poise, fsdp2"])
    print("| | median step | of Poise's fsdp2 |\n|---|---|---|")
    for label, times in found.items():
        median = statistics.median(times)
        print(f"| {label} | {1000 * median:.0f} ms | {median / ours:.2f} |")


if __name__ == "__main__":
    main()
