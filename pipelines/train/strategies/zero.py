"""DeepSpeed's ZeRO: optimizer state, gradients and parameters in flat partitions on the workers."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from operators.optim import OnlineMergingAdamW
from pipelines.train.architecture import tied_names
from pipelines.train.config import AlignConfig
from pipelines.train.strategies.base import Strategy
from pipelines.train.strategies.loading import Owned, empty_model, fill
from pipelines.train.strategies.zero_layout import check_layouts, flat_layouts
from pipelines.train.strategies.zero_loading import load_into_engine
from pipelines.train.strategies.zero_resume import (
    TAG,
    SavedShards,
    load_shards,
    load_weights,
    num_saved,
    save_layout,
)
from pipelines.train.strategy_table import ZERO_BUCKET


@final
class ZeroStrategy(Strategy):
    """`zero1`, `zero2` and `zero3`; online merging optimizers are bound to the flat partitions."""

    def __init__(
        self,
        config: AlignConfig,
        device: torch.device,
        build_optimizer: Callable[[nn.Module], Optimizer],
    ) -> None:
        import deepspeed

        self.config = config
        join_deepspeed(device)
        model, self.weights = empty_model(config.model, config.head, config.attention)
        self.tied_names = tied_names(model)
        settings = engine_settings(config, sum(p.numel() for p in model.parameters()))
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.parameter_names = frozenset(name for name, _ in model.named_parameters())
        self.optimizer = build_optimizer(model)  # now, while parameters still have their shapes
        names = {parameter: name for name, parameter in model.named_parameters()}
        grouped = [[names[p] for p in group["params"]] for group in self.optimizer.param_groups]
        load_into_engine(model, self.weights, settings, device)
        parameters = dict(model.named_parameters())
        for group, own in zip(self.optimizer.param_groups, grouped, strict=True):
            group["params"] = [parameters[name] for name in own]
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings
        )
        self.model: nn.Module = self._engine
        self._layouts = flat_layouts(self._engine)
        check_layouts(self._layouts, self.weights, self._engine)
        for flat in self._layouts:
            flat.data.zero_()  # otherwise padding is uninitialised
        fill(self.owned(), self.weights)  # master weights in full precision, not rounded to bf16
        if isinstance(self.optimizer, OnlineMergingAdamW):
            self.optimizer.bind(self._layouts)

    def owned(self) -> Iterator[Owned]:
        """The ranges of this rank's flat partitions."""
        for flat, layouts in self._layouts.items():
            for layout in layouts:
                yield layout, flat.data[layout.offset : layout.offset + layout.count]

    def forward_context(self) -> AbstractContextManager[object]:
        """Nothing: the engine sets the precision."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Tell the engine which micro-batch is a step's last."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; the engine reduces them according to its stage."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def update(self, check: Callable[[float], None]) -> float:
        """The engine clips and steps at once, so the check comes after it."""
        self._engine.step()
        # Otherwise a parameter without gradient would keep the last step's gradient (stage 3).
        last = getattr(self._engine.optimizer, "grad_partitions_flat_buffer", None)
        if last is not None:
            last.zero_()
        norm = self._engine.get_global_grad_norm()
        value = float("nan") if norm is None else float(norm)
        check(value)
        return value

    @contextlib.contextmanager
    def _all_parameters_shown(self) -> Iterator[None]:
        """In the block, the optimizer's groups hold all flat tensors of this rank. Stage 3 itself
        puts them there only during a step, one after another.
        """
        if self.config.traits.zero_stage < 3:
            yield
            return
        inner, groups = self._engine.optimizer, self.optimizer.param_groups
        before = [group["params"] for group in groups]
        try:
            for i, group in enumerate(groups):
                group["params"] = [
                    flat
                    for number, flat in enumerate(inner.fp32_partitioned_groups_flat)
                    if inner.sub_group_to_group_id[number] == i
                ]
            yield
        finally:
            for group, params in zip(groups, before, strict=True):
                group["params"] = params

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's own checkpoint, and the layout that other numbers of workers need."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        save_layout(self._layouts, folder)

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote, on any number of ranks."""
        if num_saved(folder) == dist.get_world_size():
            self._engine.load_checkpoint(str(folder), tag=TAG)
            return
        saved = SavedShards(folder)
        load_shards(saved, self._layouts, self.optimizer)
        load_weights(saved, self._engine)


def engine_settings(config: AlignConfig, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's config for a model of this many parameters."""
    share = config.global_batch_size // config.num_workers
    micro = config.micro_batch_size or share
    zero: dict[str, Any] = {
        "stage": config.traits.zero_stage,
        "overlap_comm": False,
        # DeepSpeed allocates a whole bucket; its default has 500 million elements.
        "reduce_bucket_size": min(num_parameters, ZERO_BUCKET),
    }
    if config.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.traits.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "gradient_clipping": config.max_gradient_norm or 0.0,
        "steps_per_print": 2**31,
    }


def join_deepspeed(device: torch.device) -> None:
    """Make DeepSpeed use the workers' process group."""
    import deepspeed

    assert dist.is_initialized()
    # On a CPU DeepSpeed would compile a kernel that only its inference needs. A worker that is
    # killed meanwhile leaves a lock, and every later run would wait for it forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
