"""Training workers as plain processes: as under Ray Train, but started in a second."""

import faulthandler
import importlib
import multiprocessing
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.run import worker_settings

# Workers are forked from a process that has imported this once: ten seconds less for each.
PRELOADED = [
    "pipelines.train.loop",
    "pipelines.train.strategies.native",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
]
ALIGN = "pipelines.train.loop:train_worker"
DEADLINE_S = 200  # of a worker, which then ends with its stack, before pytest gives up on it


def run_workers(
    config: AlignConfig,
    folder: Path,
    *,
    kill_after: int | None = None,
    max_file_bytes: int | None = None,
) -> Path:
    """Train with the config's number of workers; returns the folder of the unfinished run.

    With `kill_after` one worker is killed once so many steps are done; the others are lost too.
    With `max_file_bytes` the system refuses to write more into any file, as on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache = folder.parent / "cache"
    settings = worker_settings(config, plan_alignment(config, cache), folder, cache)
    return run_settings(
        settings, config.num_workers, kill_after=kill_after, max_file_bytes=max_file_bytes
    )


def run_settings(
    settings: dict[str, Any],
    num_workers: int,
    *,
    worker: str = ALIGN,
    kill_after: int | None = None,
    max_file_bytes: int | None = None,
) -> Path:
    """As `run_workers`, by a run's settings and a worker's function, as MODULE:NAME."""
    arguments = (num_workers, _free_port(), [settings], max_file_bytes, worker)
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = mp.start_processes(
        _worker, arguments, num_workers, join=False, start_method="forkserver"
    )
    folder = Path(settings["folder"])
    if kill_after is not None:
        path = folder / "metrics.jsonl"
        while not path.is_file() or len(path.read_text().splitlines()) < kill_after:
            assert not context.join(0.002), "the run ended before it could be killed"
        os.kill(context.pids()[-1], signal.SIGKILL)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException:
        if kill_after is None:
            raise
    return folder


def run_workers_in_turn(configs: dict[Path, AlignConfig]) -> None:
    """Train several configs, by the folders of their runs, one after another on the same workers.
    All have the same number of workers; each run's cache is beside it.
    """
    runs = []
    for folder, config in configs.items():
        folder.mkdir(parents=True, exist_ok=True)
        cache = folder.parent / "cache"
        runs.append(worker_settings(config, plan_alignment(config, cache), folder, cache))
    (num_workers,) = {config.num_workers for config in configs.values()}
    multiprocessing.set_forkserver_preload(PRELOADED)
    arguments = (num_workers, _free_port(), runs, None, ALIGN)
    mp.start_processes(_worker, arguments, num_workers, start_method="forkserver")


def _free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def _begin(rank: int, world: int, port: int) -> None:
    """What each worker starts with: its place among the others, and a deadline."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Nobody may compile an extension: one killed meanwhile leaves a lock that others wait for.
        "TORCH_EXTENSIONS_DIR": f"{os.devnull}/none",
    }
    faulthandler.dump_traceback_later(DEADLINE_S, exit=True)


def _worker(
    rank: int,
    world: int,
    port: int,
    runs: list[dict[str, Any]],
    max_file_bytes: int | None,
    worker: str,
) -> None:
    _begin(rank, world, port)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    module, name = worker.split(":")
    train = getattr(importlib.import_module(module), name)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    train({"runs": runs})
    dist.destroy_process_group()


def run_on_given_gradients(
    configs: dict[Path, AlignConfig], num_steps: int
) -> dict[Path, dict[str, Tensor]]:
    """Step each config's strategy on `given_gradient`s, put in after the reduction, in turn on the
    same workers; returns by folder the masters of all workers together, by name.
    """
    for folder in configs:
        folder.mkdir(parents=True)
    (num_workers,) = {config.num_workers for config in configs.values()}
    texts = {folder: config.model_dump_json() for folder, config in configs.items()}
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(
        _given_worker,
        (num_workers, _free_port(), texts, num_steps),
        num_workers,
        join=True,
        start_method="forkserver",
    )
    return {folder: _joined(folder, num_workers) for folder in configs}


def _joined(folder: Path, num_workers: int) -> dict[str, Tensor]:
    """The parts that the workers have written, by name, in their order."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for rank in range(num_workers):
        for name, start, values in torch.load(folder / f"{rank}.pt", weights_only=True):
            parts.setdefault(name, []).append((start, values))
    ordered = {name: sorted(found, key=lambda part: part[0]) for name, found in parts.items()}
    return {name: torch.cat([values for _, values in found]) for name, found in ordered.items()}


def memory_of_loading(config: AlignConfig, folder: Path) -> list[int]:
    """Bytes that each worker came to hold at most, beyond what it held before, while it got its
    share of the weights under zero3.
    """
    folder.mkdir(parents=True)
    arguments = (config.num_workers, _free_port(), config.model_dump_json(), folder)
    mp.spawn(_loading_worker, arguments, config.num_workers)
    return [int((folder / str(rank)).read_text()) for rank in range(config.num_workers)]


def _loading_worker(rank: int, world: int, port: int, config_text: str, folder: Path) -> None:
    _begin(rank, world, port)
    import deepspeed

    from pipelines.train.metrics import peak_memory
    from pipelines.train.strategies.loading import empty_model
    from pipelines.train.strategies.zero import engine_settings, join_deepspeed
    from pipelines.train.strategies.zero_loading import load_into_engine

    dist.init_process_group("gloo", rank=rank, world_size=world)
    join_deepspeed(torch.device("cpu"))
    config = AlignConfig.model_validate_json(config_text)
    model, weights = empty_model(config.model)
    settings = engine_settings(config, sum(p.numel() for p in model.parameters()))
    deepspeed.zero.Init(module=torch.nn.Linear(2, 2), config_dict_or_path=settings)  # imports
    before = psutil.Process().memory_info().rss
    load_into_engine(model, weights, settings, torch.device("cpu"))
    (folder / str(rank)).write_text(str(peak_memory() - before))
    dist.destroy_process_group()


def given_gradient(step: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The same for every sharding: (elements of the shape,) float32."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    return torch.randn(torch.Size(shape).numel(), generator=generator)


def _given_worker(
    rank: int, world: int, port: int, config_texts: dict[Path, str], num_steps: int
) -> None:
    _begin(rank, world, port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for folder, text in config_texts.items():
        _step_on_given_gradients(AlignConfig.model_validate_json(text), rank, folder, num_steps)
    dist.destroy_process_group()


def _step_on_given_gradients(config: AlignConfig, rank: int, folder: Path, num_steps: int) -> None:
    from pipelines.train.strategies import build_strategy

    strategy = build_strategy(config, torch.device("cpu"))
    reduced_step, step = strategy.optimizer.step, 0

    def given_step(closure: None = None) -> None:
        for flat, layouts in strategy._layouts.items():
            for layout in layouts if flat.grad is not None else []:
                values = given_gradient(step, layout.name, layout.shape)
                place = slice(layout.offset, layout.offset + layout.count)
                flat.grad[place] = values[layout.start : layout.start + layout.count]
        reduced_step()

    strategy.optimizer.step = given_step
    ids = torch.arange(6).repeat(2, 1) + rank
    for number in range(num_steps):
        step = number
        with strategy.accumulating(last=True):
            strategy.backward(strategy.model(input_ids=ids, labels=ids).loss)
        strategy.update(lambda norm: None)
    found = [(part.name, part.start, values.clone()) for part, values in strategy.owned()]
    torch.save(found, folder / f"{rank}.pt")
