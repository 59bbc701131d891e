"""Training workers as plain processes: as under Ray Train, but started in a second."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.run import worker_settings


def run_workers(config: AlignConfig, folder: Path) -> Path:
    """Train with the config's number of workers; returns the folder of the unfinished run."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = folder.parent / "cache"
    settings = worker_settings(config, plan_alignment(config, cache), folder, cache)
    mp.start_processes(
        _worker,
        (config.num_workers, _free_port(), settings),
        config.num_workers,
        start_method="spawn",
    )
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
    train_worker(settings)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit("this is a helper of the tests")
