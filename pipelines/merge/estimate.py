"""The cost of a merge: bytes and memory from its plan, time from merging one of its tensors."""

import time
from dataclasses import dataclass

import torch

from pipelines.merge.executors import check_gpu
from pipelines.merge.plan import MergePlan
from pipelines.merge.tensor import TensorMerge

SAMPLE_ELEMENTS = 1 << 22  # the timed tensor has at most this size, if possible


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated cost of a merge.

    Attributes:
        input_bytes: read in one pass over the inputs.
        output_bytes: written.
        num_passes: over the inputs; later passes read mostly from the page cache.
        memory_bytes: of all workers at the same time, without the program itself.
        seconds: of the whole merge, without start-up and waiting for a slow disk.
    """

    input_bytes: int
    output_bytes: int
    num_passes: str
    memory_bytes: int
    seconds: float


def estimate(plan: MergePlan) -> Estimate:
    """Estimate a plan's cost; merges one tensor in memory to measure the speed of this machine.

    Raises:
        InputError: NaN or Inf in that tensor, or no GPU for a merge that needs one.
    """
    check_gpu(plan)
    needs = sorted(plan.num_working_bytes, reverse=True)[: plan.config.num_workers]
    floating = [t for t in plan.tensors.values() if t.dtype.is_floating_point and t.num_elements]
    sample = min(floating, key=lambda t: (t.num_elements > SAMPLE_ELEMENTS, -t.num_elements))
    if sample.num_elements > SAMPLE_ELEMENTS:
        sample = min(floating, key=lambda t: t.num_elements)
    total = sum(_work(tensor) for tensor in floating)
    seconds = _seconds(sample) * total / _work(sample) / plan.config.num_workers
    gathers = any(tensor.gathers for tensor in floating)
    return Estimate(
        input_bytes=plan.num_input_bytes,
        output_bytes=plan.layout.num_bytes,
        num_passes="2 to 3" if gathers else "1",
        memory_bytes=min(sum(needs), plan.config.memory_budget),
        seconds=seconds,
    )


def _work(tensor: TensorMerge) -> float:
    """A number proportional to the time: elements; for whole matrices, times the smaller side."""
    if tensor.needs_all and len(tensor.shape) == 2:
        return float(tensor.num_elements * min(tensor.shape))
    return float(tensor.num_elements)


def _seconds(tensor: TensorMerge) -> float:
    """The time of one thread for a tensor, without writing it; the first of two runs is warm-up."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(2):
            begin = time.perf_counter()
            context = tensor.context()
            for start, stop in tensor.steps(0, tensor.num_elements):
                tensor.rounded(tensor.merged(start, stop, context), start)
            seconds = time.perf_counter() - begin
    finally:
        torch.set_num_threads(num_threads)
    return seconds
