"""Resume ZeRO's checkpoints on another number of workers.

DeepSpeed's own conversion (`ds_to_universal`) keeps only Adam's two moments: it would lose the
anchor of step-K and, for stage 3, the number of steps. So each rank also writes its layout, and the
new ranks read their ranges from the old ranks' files.
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
MASTER = "master"  # key of the master weights, beside the optimizer's own state names


def save_layout(layouts: Layouts, folder: Path) -> None:
    """Write the ranges in this rank's flat tensors."""
    parts = [[[p.name, p.start, p.count, p.offset] for p in found] for found in layouts.values()]
    write_atomically(_layout_file(folder, dist.get_rank()), json.dumps(parts))


def num_saved(folder: Path) -> int:
    """The number of ranks that wrote a checkpoint."""
    return len(list(folder.glob("layout-*.json")))


def _layout_file(folder: Path, rank: int) -> Path:
    return folder / f"layout-{rank}.json"


@dataclass(frozen=True, slots=True)
class _Piece:
    """A saved range of a parameter: its position, and the flat tensors and numbers of its state."""

    start: int
    count: int
    offset: int
    values: dict[str, Any]


class SavedShards:
    """The checkpoint files of all ranks, memory-mapped."""

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
        """The states of a parameter: name -> an example."""
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
    """For each of a rank's flat tensors, the master weights and the optimizer's state."""
    if "fp32_flat_groups" in saved:  # stage 3
        masters, state = saved["fp32_flat_groups"], saved["optimizer_state_dict"]["state"]
    else:
        masters = saved["single_partition_of_fp32_groups"]
        state = saved["base_optimizer_state"]["state"]
    for number, master in enumerate(masters):
        yield {MASTER: master, **state[number]}


@torch.no_grad()
def load_shards(saved: SavedShards, layouts: Layouts, optimizer: Optimizer) -> None:
    """Fill this rank's tensors (flat ones or whole parameters) and their optimizer state."""
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
    """Whether a state has one number per element, not one for all."""
    return isinstance(value, Tensor) and value.dim() > 0


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@torch.no_grad()
def load_weights(saved: SavedShards, engine: Any) -> None:
    """Copy the master weights into the model, in its precision; all ranks call together."""
    import deepspeed

    sharded = engine.zero_optimization_partition_weights()  # stage 3
    for parameter, name in engine.param_names.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            if sharded and dist.get_rank() != 0:
                continue
            whole = torch.empty(parameter.numel())
            saved.read(name, MASTER, 0, whole.numel(), whole)
            parameter.data.copy_(whole.view(parameter.shape))
