"""Log-probabilities of the reference model, computed once before the first step."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipelines.commit import write_atomically
from pipelines.train.checkpoints import is_first, wait_for_all
from pipelines.train.data import Batch, Pair
from pipelines.train.policy import response_log_probabilities

FILE = "reference.safetensors"


@torch.no_grad()
def reference_log_probabilities(
    model: nn.Module,
    pairs: list[Pair],
    collate: Callable[[list[Pair]], Batch],
    folder: Path,
    *,
    batch_size: int,
    mean_over_tokens: bool,
) -> Tensor:
    """The policy's own log-probabilities before training: (pairs, 2) float32, chosen, rejected.

    Each rank takes every world-size-th pair of the pairs ordered by length; a file below `folder`
    keeps the result for a run that goes on later, when the policy is the reference no more.
    """
    path = folder / FILE
    if path.is_file():
        return load_file(path)["log_probabilities"]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = sorted(range(len(pairs)), key=lambda i: (_length(pairs[i]), i))
    # Sharded forward passes are collective, so every rank makes equally many.
    order += order[-1:] * (-len(order) % world)
    mine = order[rank::world]
    device = next(model.parameters()).device
    values = torch.full((len(pairs), 2), -torch.inf, device=device)
    model.eval()
    for first in range(0, len(mine), batch_size):
        chosen = mine[first : first + batch_size]
        batch = collate([pairs[i] for i in chosen])
        both = response_log_probabilities(model, batch, mean_over_tokens=mean_over_tokens)
        values[chosen] = torch.stack(both, dim=1)
    model.train()
    if world > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    values = values.cpu()
    if is_first():
        write_atomically(path, save({"log_probabilities": values}))
    wait_for_all()
    return values


def _length(pair: Pair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
