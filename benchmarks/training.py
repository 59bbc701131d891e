"""DPO steps of Poise beside TRL's: the same model, rows and batch, float32, one thread.

    python benchmarks/training.py --steps 40

Builds the data of the tiny world's rich size and a model with random weights (which does not change
the times), trains it with both tools and prints a Markdown table: the median time of a step after
the first ten, rows a second at it, and the fastest step, which a busy machine disturbs least. Poise
runs as fsdp2 with one worker and as single; with logits by chunks; and with the norms of update and
delta measured in each step. TRL runs with reference log-probabilities computed in advance, as Poise
does, and with its default, a reference model in each step. The tools take turns, so that a busy
machine slows both.
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
from pipelines.tiny_world.architecture import architecture
from pipelines.tiny_world.sizes import SIZES
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.loop import train_worker
from pipelines.train.run import worker_settings
from ray_jobs.session import quiet_environment

WARM_UP = 10
TRL = (("reference beforehand", True), ("default", False))
# A step has over 2,000 positions; norms are measured at the last step alone unless asked for.
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fsdp2", {}),
    ("single", {}),
    ("single", {"logits_chunk": 256}),
    ("single", {"norms_every": 1}),
    ("fsdp2", {"norms_every": 1}),
)
BATCH, BETA, LEARNING_RATE = 32, 0.1, 2e-5


def make_model(world: Path, path: Path) -> None:
    """The rich size with random weights."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(architecture(SIZES["rich"], tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)


def poise_steps(
    model: Path, data: Path, folder: Path, strategy: str, steps: int, **fields: Any
) -> list[float]:
    """Seconds of each step of Poise, from its metrics.

    Args:
        fields: of the config, beside the usual ones.
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
        checkpoint_every=10**6,
        **fields,
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
            for run, (strategy, fields) in enumerate(RUNS):
                place = folder / f"poise-{run}-{number}"
                times = poise_steps(model, data, place, strategy, arguments.steps, **fields)
                label = ", ".join([f"Poise, {strategy}", *(f"{k} {v}" for k, v in fields.items())])
                found.setdefault(label, []).extend(times)
            for label, beforehand in () if arguments.alone else TRL:
                times = trl_steps(
                    model, data, folder / f"{label}-{number}", beforehand, arguments.steps
                )
                found.setdefault(f"TRL, {label}", []).extend(times)
        dist.destroy_process_group()
    ours = statistics.median(found["Poise, fsdp2"])
    print("| | median step | of Poise's fsdp2 | rows/s | fastest step |\n|---|---|---|---|---|")
    for label, times in found.items():
        median = statistics.median(times)
        cells = [f"{1000 * median:.0f} ms", f"{median / ours:.2f}", f"{BATCH / median:.0f}"]
        print(f"| {' | '.join([label, *cells, f'{1000 * min(times):.0f} ms'])} |")


if __name__ == "__main__":
    main()
