"""Training workers as plain processes: as under Ray Train, but started in a second."""

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.run import worker_settings

# Workers are forked from a process that has imported this once: ten seconds less for each.
PRELOADED = ["pipelines.train.loop", "transformers.models.llama.modeling_llama", "deepspeed"]


def run_workers(config: AlignConfig, folder: Path, *, kill_after: int | None = None) -> Path:
    """Train with the config's number of workers; returns the folder of the unfinished run.

    With `kill_after` one worker is killed once so many steps are done; the others are lost too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache = folder.parent / "cache"
    settings = worker_settings(config, plan_alignment(config, cache), folder, cache)
    arguments = (config.num_workers, _free_port(), settings)
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = mp.start_processes(
        _worker, arguments, config.num_workers, join=False, start_method="forkserver"
    )
    if kill_after is not None:
        path = folder / "metrics.jsonl"
        while not path.is_file() or len(path.read_text().splitlines()) < kill_after:
            time.sleep(0.002)
        os.kill(context.pids()[-1], signal.SIGKILL)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException:
        if kill_after is None:
            raise
    return folder


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def _worker(rank: int, world: int, port: int, settings: dict[str, Any]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from pipelines.train.loop import train_worker

    dist.init_process_group("gloo", rank=rank, world_size=world)
    train_worker({"runs": [settings]})
    dist.destroy_process_group()
