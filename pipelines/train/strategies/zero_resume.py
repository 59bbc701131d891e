"""ZeRO's checkpoints on another number of workers.

DeepSpeed's own conversion (`ds_to_universal`) takes Adam's two moments alone: it would lose the
anchor of step-K and, for stage 3, the number of steps. So each rank's layout is written beside its
checkpoint, and the new ranks read the ranges that they own from the old ranks' files.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from operators.optim import ShardLayout
from pipelines.commit import write_atomically
from pipelines.train.strategies.zero_layout import Layouts

TAG = "state"  # DeepSpeed's name for the folder of its files
MASTER = "master"  # beside the names that the optimizer gives its state


def save_layout(layouts: Layouts, folder: Path) -> None:
    """Write which ranges lie in this rank's flat tensors."""
    parts = [[[p.name, p.start, p.count, p.offset] for p in found] for found in layouts.values()]
    write_atomically(_layout_file(folder, dist.get_rank()), json.dumps(parts))


def num_saved(folder: Path) -> int:
    """How many ranks have written a checkpoint."""
    return len(list(folder.glob("layout-*.json")))


def _layout_file(folder: Path, rank: int) -> Path:
    return folder / f"layout-{rank}.json"


@dataclass(frozen=True, slots=True)
class _Piece:
    """A saved range of a parameter: where it lies, and the flat tensors and numbers it lies in."""

    start: int
    count: int
    offset: int
    values: dict[str, Any]


class SavedShards:
    """The checkpoint of all ranks that wrote it; files are mapped, and read where they are used."""

    def __init__(self, folder: Path) -> None:
        self._pieces: dict[str, list[_Piece]] = {}
        for rank in range(num_saved(folder)):
            (path,) = (folder / TAG).glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
            flats = list(_flat_values(saved["optimizer_state_dict"]))
            for values, parts in zip(
                flats, json.loads(_layout_file(folder, rank).read_text()), strict=True
            ):
                for name, start, count, offset in parts:
                    piece = _Piece(start, count, offset, values)
                    self._pieces.setdefault(name, []).append(piece)

    def states(self, name: str) -> dict[str, Any]:
        """What is known of a parameter: each state's name, and an example."""
        return self._pieces[name][0].values

    def read(self, name: str, state: str, start: int, count: int, out: Tensor) -> None:
        """Fill `out` with a parameter's range [start, start + count) of a state."""
        for piece in self._pieces[name]:
            low = max(start, piece.start)
            high = min(start + count, piece.start + piece.count)
            if low < high:
                first = piece.offset + low - piece.start
                out[low - start : high - start] = piece.values[state][first : first + high - low]


def _flat_values(saved: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """For each of a rank's flat tensors the master weights and the optimizer's state."""
    if "fp32_flat_groups" in saved:  # stage 3
        masters, state = saved["fp32_flat_groups"], saved["optimizer_state_dict"]["state"]
    else:
        masters = saved["single_partition_of_fp32_groups"]
        state = saved["base_optimizer_state"]["state"]
    for number, master in enumerate(masters):
        yield {MASTER: master, **state[number]}


@torch.no_grad()
def load_shards(saved: SavedShards, layouts: Layouts, optimizer: Optimizer) -> None:
    """Fill this rank's tensors, flat or whole parameters, and the optimizer's state of them."""
    for flat, parts in layouts.items():
        for state, example in saved.states(parts[0].name).items():
            if state != MASTER and not _is_flat(example):
                optimizer.state[flat][state] = _copied(example)
                continue
            target = flat.data
            if state != MASTER:
                target = torch.zeros_like(flat.data, dtype=example.dtype)
                optimizer.state[flat][state] = target
            for part in parts:
                _fill(saved, state, part, target)


def _fill(saved: SavedShards, state: str, part: ShardLayout, target: Tensor) -> None:
    place = target.view(-1)[part.offset : part.offset + part.count]
    saved.read(part.name, state, part.start, part.count, place)


def _is_flat(value: Any) -> bool:
    """Whether a state has a number for each element, rather than one for all."""
    return isinstance(value, Tensor) and value.dim() > 0


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@torch.no_grad()
def load_weights(saved: SavedShards, engine: Any) -> None:
    """Give the model the weights of the masters, in its precision; all ranks together."""
    import deepspeed

    sharded = engine.zero_optimization_partition_weights()  # stage 3
    for parameter, name in engine.param_names.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            if sharded and dist.get_rank() != 0:
                continue
            whole = torch.empty(parameter.numel())
            saved.read(name, MASTER, 0, whole.numel(), whole)
            parameter.data.copy_(whole.view(parameter.shape))
