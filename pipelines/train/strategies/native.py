"""torch's strategies: one process, replicas (DDP), or shards by rows (FSDP2)."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from operators.optim.layout import layout_of, local
from pipelines.train.architecture import blocks_of, tied_names
from pipelines.train.config import AlignConfig
from pipelines.train.strategies.base import StagingStrategy, first_rank
from pipelines.train.strategies.loading import (
    Owned,
    empty_model,
    fill,
    materialize,
)
from pipelines.train.strategies.lora import (
    add_adapters,
    base_name,
    begin_adapters,
    is_adapter,
    merged_parameters,
    whole,
)


class SingleStrategy(StagingStrategy):
    """`single`: the whole model in one process. `ddp` and `fsdp2` are subclasses. The checkpoints
    of all three are interchangeable.
    """

    def __init__(
        self,
        config: AlignConfig,
        device: torch.device,
        build_optimizer: Callable[[nn.Module], Optimizer],
    ) -> None:
        self.config, self.device = config, device
        model, self.weights = empty_model(config.model, config.head, config.attention)
        self.tied_names = tied_names(model)
        if config.lora is not None:
            add_adapters(model, config.lora)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._shard(model)
        materialize(model, torch.device("cpu") if config.cpu_offload else device, self.weights)
        self.bare = model
        names = [name for name, _ in model.named_parameters() if not is_adapter(name)]
        self.parameter_names = frozenset(map(base_name, names))
        fill(local_parameters(model), self.weights)
        begin_adapters(model, config.seed)
        self.model = self._wrap(model)
        # Build it before any forward pass: afterwards the root of fsdp2 holds whole parameters.
        self.optimizer = build_optimizer(model)
        self._stager: DefaultStager | None = None

    def _shard(self, model: nn.Module) -> None:
        """Shard a model without memory over the workers; nothing for a single process."""

    def _wrap(self, model: nn.Module) -> nn.Module:
        """The module for forward passes."""
        return model

    def owned(self) -> Iterator[Owned]:
        """The master weights that this rank owns; the first rank owns all replicated ones."""
        if self.config.traits.is_sharded or first_rank():
            if self.config.lora is None:
                yield from local_parameters(self.bare)
            else:
                yield from merged_parameters(self.bare, self.config.lora)

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """The factors of the adapters, gathered from all ranks."""
        for name, parameter in self.bare.named_parameters():
            if is_adapter(name):
                yield name, whole(parameter).cpu()

    def forward_context(self) -> AbstractContextManager[object]:
        """The context of forward passes: their precision."""
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """The context of a micro-batch: nothing."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        loss.backward()

    def update(self, check: Callable[[float], None]) -> float:
        """Clip to the config's limit, step, drop gradients; returns the norm before clipping."""
        limit = self.config.max_gradient_norm
        parameters = [p for p in self.bare.parameters() if p.grad is not None]
        found = nn.utils.clip_grad_norm_(
            parameters, torch.inf if limit is None else limit, foreach=True
        )
        norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
        check(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def save(self, folder: Path) -> None:
        """Write parameters and optimizer state, all ranks together."""
        _write(self._state(), None, folder)

    def stage(self, group: dist.ProcessGroup | None) -> Callable[[Path], None]:
        """Copy parameters and optimizer state to CPU memory; returns a function that writes the
        copy.

        The copy's memory is reused, so write the copy before staging again.

        Args:
            group: a group of all ranks on CPUs, only for writing; None if there is one process.
        """
        if self._stager is None:
            pinned = self.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(pinned, False, False, False))
        staged = self._stager.stage(self._state())
        assert isinstance(staged, dict)  # not a future, because the stager has no thread
        return partial(_write, staged, group)

    def _state(self) -> dict[str, Any]:
        """Parameters and optimizer state by name for DCP, without copies."""
        weights, moments = get_state_dict(self.bare, self.optimizer)
        return {"model": weights, "optimizer": moments}

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote, on any number of ranks."""
        state = self._state()
        with _no_complaints():
            dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.bare,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


@final
class DdpStrategy(SingleStrategy):
    """`ddp`: replicas that average their gradients."""

    def _wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model)

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """The context of a micro-batch: gradients are averaged only at the last one."""
        assert isinstance(self.model, nn.parallel.DistributedDataParallel)
        return contextlib.nullcontext() if last else self.model.no_sync()


@final
class Fsdp2Strategy(SingleStrategy):
    """`fsdp2`: each worker holds some rows of every parameter."""

    def _shard(self, model: nn.Module) -> None:
        """Shard each block and then the rest by rows over all workers."""
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        precision, offload = MixedPrecisionPolicy(), OffloadPolicy()
        if self.config.precision == "bf16":
            precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if self.config.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        for module in [*blocks_of(model), model]:
            fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)

    def forward_context(self) -> AbstractContextManager[object]:
        """Nothing: FSDP2 sets the precision."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """The context of a micro-batch: gradients are reduced only at the last one."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Afterwards, the parameters outside the blocks are not gathered any more, either."""
        with super().evaluating():
            yield
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def local_parameters(model: nn.Module) -> Iterator[Owned]:
    """This rank's part of every parameter of the checkpoint, without adapters."""
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            yield layout_of(base_name(name), parameter), local(parameter)


def _write(state: dict[str, Any], group: dist.ProcessGroup | None, folder: Path) -> None:
    """Write a state, all ranks together.

    Raises:
        OSError: the error of the rank that could not write, instead of DCP's summary of all ranks.
    """
    try:
        with _no_complaints():
            dcp.save(state, checkpoint_id=folder, process_group=group)
    except CheckpointException as error:
        first, _ = error.failures[min(error.failures)]
        raise first from error


@contextlib.contextmanager
def _no_complaints() -> Iterator[None]:
    """Suppress DCP's warning about running in one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
