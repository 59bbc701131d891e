"""What a strategy does: lay model and optimizer out over the workers, and step them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from operators.optim.layout import ShardLayout


class Strategy(Protocol):
    """One way to spread a model over workers. Every method is called by all ranks together."""

    model: nn.Module
    optimizer: Optimizer
    parameter_names: frozenset[str]
    tied_names: Mapping[str, list[str]]

    def owned(self) -> Iterable[tuple[ShardLayout, Tensor]]:
        """Master weights that this rank alone answers for: together, all ranks have each once."""
        ...

    def forward_context(self) -> AbstractContextManager[object]:
        """Around forward passes."""
        ...

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of one micro-batch of a step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients, averaged over workers at the step's last one."""
        ...

    def update(self, check: Callable[[float], None]) -> float:
        """Clip the gradients, step the optimizer, drop the gradients.

        Args:
            check: called with the gradients' global norm, raises where the run must stop; before
                the step where the strategy can.

        Returns:
            the norm before clipping.
        """
        ...

    def merge_pending(self) -> None:
        """Let an online merging optimizer merge what it has put off."""
        ...

    def save(self, folder: Path) -> None:
        """Write what a resumption needs into an existing folder."""
        ...

    def stage(self, group: dist.ProcessGroup | None) -> Callable[[Path], None]:
        """Copy that into CPU memory; what comes back writes the copy while steps go on.

        Args:
            group: of all ranks, on CPUs, for the writers alone; None where there is one process.
        """
        ...

    def load(self, folder: Path) -> None:
        """Go back to what `save` wrote."""
        ...


def first_rank() -> bool:
    """Whether this process is rank 0, which alone writes what is not sharded."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all(group: dist.ProcessGroup | None = None) -> None:
    """Return when every rank has come here."""
    if dist.is_initialized():
        dist.barrier(group)
