"""The memory of alignment runs beside the formula of docs/training.md.

    python benchmarks/memory.py

Trains a random Llama with 42M parameters for two DPO steps with each setting below, in separate
processes, and prints a Markdown table: the growth of a worker's peak resident memory during the
run, the formula's number, and their ratio.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.memory import estimate_memory, shape_of
from pipelines.train.run import worker_settings
from ray_jobs.session import quiet_environment

ONDARE = {"name": "ondare", "learning_rate": 1e-5, "density": 0.5, "alpha": 1e-2}
ONTIES = {"name": "onties", "learning_rate": 1e-5, "density": 0.2, "alpha": 1e-2}
TWO = {"num_workers": 2, "micro_batch_size": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "single": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "reference on the fly": {"reference_log_probabilities": "on_the_fly"},
    "chunks of 64 positions": {"logits_chunk": 64},
    "chunks, reference on the fly": {
        "logits_chunk": 64,
        "reference_log_probabilities": "on_the_fly",
    },
    "adapters of rank 16": {"lora": {"rank": 16}},
    "ondare": {"optimizer": ONDARE},
    "onties, density 0.2": {"optimizer": ONTIES},
    "ondare, merge_every 2": {"optimizer": ONDARE | {"merge_every": 2}},
    "ddp": {"strategy": "ddp"} | TWO,
    "fsdp2": {"strategy": "fsdp2"} | TWO,
    "fsdp2, ondare, bf16": {"strategy": "fsdp2", "optimizer": ONDARE, "precision": "bf16"} | TWO,
    "zero1": {"strategy": "zero1"} | TWO,
    "zero2": {"strategy": "zero2"} | TWO,
    "zero3": {"strategy": "zero3"} | TWO,
    "zero3, onties, bf16": {"strategy": "zero3", "optimizer": ONTIES, "precision": "bf16"} | TWO,
}
LENGTH = 64  # tokens of each sequence


def make_inputs(folder: Path) -> None:
    """Two models with a tokenizer of numbers, and preference pairs of one length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {str(number): number for number in range(16384)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
    )
    for seed, name in enumerate(("base", "model")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="1").save_pretrained(
            folder / name
        )
    prompt, rest = "7 " * (LENGTH // 2), LENGTH // 2 - 1
    row = {"prompt": prompt, "chosen": " 8" * rest, "rejected": " 9" * rest}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 16)


def config_of(name: str, folder: Path) -> AlignConfig:
    """The config of a setting."""
    fields: dict[str, Any] = {
        "model": folder / "model",
        "data": folder / "rows.jsonl",
        "optimizer": {"learning_rate": 1e-5},
        "num_steps": 2,
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "strategy": "single",
        "num_workers": 1,
    }
    fields |= SETTINGS[name]
    if "density" in fields["optimizer"]:
        tau = {"base": folder / "base", "tuned": folder / "model"}
        fields["optimizer"] = fields["optimizer"] | {"tau": tau}
    return AlignConfig(**fields)


def measure(name: str, folder: Path) -> None:
    """Run a setting; each worker writes a file with the growth of its peak memory in bytes."""
    config = config_of(name, folder)
    run = folder / "run"
    run.mkdir()
    settings = worker_settings(config, plan_alignment(config, folder / "cache"), run, folder)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    mp.spawn(_worker, (config.num_workers, port, settings, folder), config.num_workers)


def _worker(rank: int, world: int, port: int, settings: dict[str, Any], folder: Path) -> None:
    import deepspeed
    import peft
    import psutil
    import transformers.models.llama.modeling_llama

    from pipelines.train.loop import train_worker
    from pipelines.train.metrics import peak_memory

    assert deepspeed and peft and transformers  # imported before, so their memory does not count
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    before = psutil.Process().memory_info().rss
    train_worker({"runs": [settings | {"num_threads": 1}]})
    (folder / f"held-{rank}").write_text(str(peak_memory() - before))
    dist.destroy_process_group()


def measured_and_expected(name: str, inputs: Path) -> tuple[int, int]:
    """The largest worker's memory growth in bytes, and the formula's number."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for file in inputs.iterdir():
            (folder / file.name).symlink_to(file)
        command = [sys.executable, __file__, "--measure", name, "--folder", place]
        # Freed memory is returned at once, so that resident memory is the memory in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "PYTHONWARNINGS": "ignore"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        held = max(int(file.read_text()) for file in folder.glob("held-*"))
        config = config_of(name, folder)
        return held, estimate_memory(shape_of(config.model, config.head), config, LENGTH).total


def main() -> None:
    """Measure every setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="some of the settings")
    parser.add_argument("--measure", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_environment()
    if arguments.measure:
        measure(arguments.measure, arguments.folder)
        return
    print("| | measured | formula | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        make_inputs(Path(place))
        for name in arguments.only or SETTINGS:
            held, expected = measured_and_expected(name, Path(place))
            megabytes = f"{held / 1e6:.0f} MB | {expected / 1e6:.0f} MB"
            print(f"| {name} | {megabytes} | {held / expected:.2f} |", flush=True)


if __name__ == "__main__":
    main()
