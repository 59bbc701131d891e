"""What a strategy does: lay model and optimizer out over the workers, and step them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from operators.optim.layout import ShardLayout
from pipelines.train.config import AlignConfig


class Strategy(ABC):
    """One way to spread a model over workers. Every method is called by all ranks together."""

    model: nn.Module
    optimizer: Optimizer
    parameter_names: frozenset[str]
    tied_names: Mapping[str, list[str]]

    @abstractmethod
    def __init__(
        self,
        config: AlignConfig,
        device: torch.device,
        build_optimizer: Callable[[nn.Module], Optimizer],
    ) -> None:
        """Model and optimizer of a config, laid out over the workers."""

    @abstractmethod
    def owned(self) -> Iterable[tuple[ShardLayout, Tensor]]:
        """Master weights that this rank alone answers for: together, all ranks have each once."""

    @abstractmethod
    def forward_context(self) -> AbstractContextManager[object]:
        """Around forward passes."""

    @abstractmethod
    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of one micro-batch of a step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients, averaged over workers at the step's last one."""

    @abstractmethod
    def update(self, check: Callable[[float], None]) -> float:
        """Clip the gradients, step the optimizer, drop the gradients.

        Args:
            check: called with the gradients' global norm, raises where the run must stop; before
                the step where the strategy can.

        Returns:
            the norm before clipping.
        """

    @abstractmethod
    def merge_pending(self) -> None:
        """Let an online merging optimizer merge what it has put off."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what a resumption needs into an existing folder."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Go back to what `save` wrote."""


class StagingStrategy(Strategy):
    """One that can also write its state while steps go on."""

    @abstractmethod
    def stage(self, group: dist.ProcessGroup | None) -> Callable[[Path], None]:
        """Copy what `save` writes into CPU memory; what comes back writes the copy.

        Args:
            group: of all ranks, on CPUs, for the writers alone; None where there is one process.
        """


def first_rank() -> bool:
    """Whether this process is rank 0, which alone writes what is not sharded."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all(group: dist.ProcessGroup | None = None) -> None:
    """Return when every rank has come here."""
    if dist.is_initialized():
        dist.barrier(group)
