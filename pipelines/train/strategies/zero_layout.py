"""The ranges of parameters in DeepSpeed's flat partitions (0.19).

DeepSpeed does not document them. The rules below were found by loading each element's index as its
value, and `check_layouts` compares them with the weights at every start.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from operators.optim import ShardLayout
from pipelines.checkpoints import ModuleView

Layouts = dict[Tensor, list[ShardLayout]]


def flat_layouts(engine: Any) -> Layouts:
    """For each of this rank's flat tensors, the ranges of parameters in it.

    A parameter of which the rank owns nothing has a range with 0 elements.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    inner = engine.optimizer
    if isinstance(inner, DeepSpeedZeroOptimizer_Stage3):
        return _stage_3(engine, inner)
    if isinstance(inner, DeepSpeedZeroOptimizer):
        groups = zip(
            inner.single_partition_of_fp32_groups,
            inner.round_robin_bit16_groups,
            inner.round_robin_bit16_offsets,
            inner.real_dp_process_group,
            strict=True,
        )
        return {
            flat: _contiguous(engine, flat, zip(parameters, offsets, strict=True), group)
            for flat, parameters, offsets, group in groups
        }
    layouts = {}  # BF16_Optimizer: stage 1 with bf16
    for flat, parameters, group in zip(
        inner.fp32_groups_flat_partition,
        inner.bf16_groups,
        inner.real_dp_process_group,
        strict=True,
    ):
        offsets, total = [], 0
        for parameter in parameters:
            offsets.append(total)
            total += parameter.numel()
        placed = zip(parameters, offsets, strict=True)
        layouts[flat] = _contiguous(engine, flat, placed, group)
    return layouts


def _contiguous(
    engine: Any, flat: Tensor, placed: Iterable[tuple[Tensor, int]], group: Any
) -> list[ShardLayout]:
    """Stages 1 and 2: whole parameters in one long flat tensor, cut evenly over the ranks."""
    low = dist.get_rank(group) * flat.numel()
    high = low + flat.numel()
    layouts = []
    for parameter, offset in placed:
        first = min(max(offset, low), high)
        last = max(min(offset + parameter.numel(), high), first)
        start = first - offset if last > first else 0
        layouts.append(
            ShardLayout(
                name=engine.param_names[parameter],
                shape=tuple(parameter.shape),
                start=start,
                count=last - first,
                group=group,
                offset=first - low if last > first else 0,
            )
        )
    return layouts


def _stage_3(engine: Any, inner: Any) -> Layouts:
    """Stage 3: each parameter is cut evenly over the ranks; a rank's pieces follow each other."""
    layouts: Layouts = {}
    for parameters, flat in zip(inner.fp16_groups, inner.fp32_partitioned_groups_flat, strict=True):
        offset, found = 0, []
        for parameter in parameters:
            part = parameter.partition_numel()
            start = part * dist.get_rank(parameter.ds_process_group)
            count = max(0, min(part, parameter.ds_numel - start))
            found.append(
                ShardLayout(
                    name=engine.param_names[parameter],
                    shape=tuple(parameter.ds_shape),
                    start=start if count else 0,
                    count=count,
                    group=parameter.ds_process_group,
                    offset=offset if count else 0,
                )
            )
            offset += part
        layouts[flat] = found
    return layouts


@torch.no_grad()
def check_layouts(layouts: Layouts, weights: ModuleView, engine: Any) -> None:
    """Compare the layouts with the weights, right after the engine has loaded them.

    Raises:
        RuntimeError: a range holds other values, or the ranks together do not have every element
            once; then this DeepSpeed has another layout.
    """
    low_precision = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    counts: dict[str, int] = {}
    wrong = ""
    for flat, parts in layouts.items():
        for part in parts:
            values = flat.data[part.offset : part.offset + part.count].cpu()
            expected = weights.read(part.name, part.start, part.start + part.count)
            if not torch.equal(values, expected.float().to(low_precision).float()):
                wrong = part.name
            counts[part.name] = counts.get(part.name, 0) + part.count
    names = sorted(counts)
    total = torch.tensor([counts[name] for name in names] + [int(bool(wrong))])
    device = engine.device if dist.get_backend() == "nccl" else "cpu"
    total = total.to(device)
    dist.all_reduce(total)
    found = dict(zip(names, total.tolist(), strict=False))
    stored = ((name, weights.find(name)) for name in names)
    missing = [name for name, spec in stored if spec is None or found[name] != spec.num_elements]
    if total[-1] or missing:
        raise RuntimeError(
            f"parameter {wrong or (missing or ['of another rank'])[0]!r}: DeepSpeed's partitions "
            "do not lie as expected; tested with DeepSpeed 0.19.8"
        )
