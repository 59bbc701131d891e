"""The interface of a strategy: distribute model and optimizer over workers, and step them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from operators.optim import OnlineMergingAdamW
from operators.optim.ema import take_average
from operators.optim.layout import ShardLayout
from pipelines.checkpoints import ModuleView
from pipelines.train.config import AlignConfig


class Strategy(ABC):
    """One way to distribute a model over workers. All ranks call each method together."""

    config: AlignConfig
    model: nn.Module
    optimizer: Optimizer
    parameter_names: frozenset[str]
    tied_names: Mapping[str, list[str]]
    weights: ModuleView  # the checkpoint that it began with

    @abstractmethod
    def __init__(
        self,
        config: AlignConfig,
        device: torch.device,
        build_optimizer: Callable[[nn.Module], Optimizer],
    ) -> None:
        """Build model and optimizer of a config, distributed over the workers."""

    @abstractmethod
    def owned(self) -> Iterable[tuple[ShardLayout, Tensor]]:
        """The master weights that this rank owns; all ranks together own each element once."""

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """The factors of trained adapters by their names in the model, whole, in CPU memory."""
        yield from ()

    @abstractmethod
    def forward_context(self) -> AbstractContextManager[object]:
        """The context of forward passes."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In the block, passes have no gradients and leave the state of training as it is."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()

    @abstractmethod
    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """The context of the forward and backward pass of one micro-batch of a step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; at the step's last one they are averaged over workers."""

    @abstractmethod
    def update(self, check: Callable[[float], None]) -> float:
        """Clip the gradients, step the optimizer, drop the gradients.

        Args:
            check: called with the gradients' global norm (before the step if the strategy can);
                raises if the run must stop.

        Returns:
            the norm before clipping.
        """

    @torch.no_grad()
    def finish(self) -> None:
        """Make the master weights those to export: an online merging optimizer merges its pending
        steps, and the average takes their place if it is the result.
        """
        average = self.config.optimizer.ema
        with self._all_parameters_shown():
            if isinstance(self.optimizer, OnlineMergingAdamW):
                self.optimizer.merge_pending()
            if average is not None and average.mode == "export":
                take_average(self.optimizer)

    def _all_parameters_shown(self) -> AbstractContextManager[object]:
        """In the block, the optimizer's groups hold all parameters of this rank."""
        return nullcontext()

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the state for resuming into an existing folder."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote."""


class StagingStrategy(Strategy):
    """A strategy that can also write its state while steps continue."""

    @abstractmethod
    def stage(self, group: dist.ProcessGroup | None) -> Callable[[Path], None]:
        """Copy the state to CPU memory; returns a function that writes the copy.

        Args:
            group: a group of all ranks on CPUs, only for writing; None if there is one process.
        """


def first_rank() -> bool:
    """Whether this process is rank 0, the only one that writes unsharded files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all(group: dist.ProcessGroup | None = None) -> None:
    """Wait until every rank calls this."""
    if dist.is_initialized():
        dist.barrier(group)
