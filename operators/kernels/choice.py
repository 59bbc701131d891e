"""Which way arithmetic goes: compiled C, Triton, or eager torch and numpy.

One place decides for merges and for optimizers, by the number of elements and by what the machine
has. A choice is handed on as a value: nothing is switched behind anybody's back.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal, TypeVar

import torch

from operators.kernels.compiler import CompilerError
from operators.kernels.merging import MergingKernels
from operators.kernels.optimizer import CompiledOptimizer, OptimizerKernels

Implementation = Literal["auto", "eager", "compiled", "triton", "reference"]
IMPLEMENTATIONS = ("auto", "eager", "compiled", "triton")
# Elements of all tensors together, so that no sharding changes the way. Compiling takes a second,
# which passes over fewer elements do not save again.
WORTH_COMPILING = 1 << 20
Kernels = TypeVar("Kernels")
_LOG = logging.getLogger(__name__)


@cache
def merging_kernels(num_elements: int) -> MergingKernels | None:
    """The kernels for a merge of this many elements on CPUs; None: the eager way."""
    ways: dict[str, Callable[[], MergingKernels]] = {"compiled": MergingKernels}
    _, kernels = _choose("merging", "auto", torch.device("cpu"), num_elements, ways)
    return kernels


def optimizer_kernels(
    wanted: str, device: torch.device, num_elements: int
) -> tuple[str, OptimizerKernels | None]:
    """The way that online merging takes, and its kernels (None: eager).

    Args:
        wanted: of `IMPLEMENTATIONS`.
        device: of the parameters.
        num_elements: their float32 elements, on all ranks together.

    Raises:
        ValueError: a way was asked for that this machine cannot take.
    """
    ways: dict[str, Callable[[], OptimizerKernels]] = {
        "compiled": CompiledOptimizer,
        "triton": _triton,
    }
    return _choose("online merging", wanted, device, num_elements, ways)


def _choose(
    what: str,
    wanted: str,
    device: torch.device,
    num_elements: int,
    ways: Mapping[str, Callable[[], Kernels]],
) -> tuple[str, Kernels | None]:
    """The way to take, which is logged, and what it is taken with."""
    way, reason = wanted, "as asked for"
    if wanted == "auto":
        way, reason = _worth(device, num_elements, ways)
    kernels = None
    if way != "eager":
        _check_device(way, device)
        try:
            kernels = ways[way]()
        except CompilerError as error:
            if wanted != "auto":
                raise ValueError(
                    f"implementation: {way!r} does not work here ({error}); "
                    "allowed: 'eager', or install a C compiler"
                ) from error
            way, reason = "eager", str(error)
    _LOG.info("%s: %s path, %s", what, way, reason)
    return way, kernels


def _worth(device: torch.device, num_elements: int, ways: Mapping[str, object]) -> tuple[str, str]:
    """What `auto` takes for this many elements, and why."""
    if device.type == "cuda" and "triton" in ways and importlib.util.find_spec("triton"):
        return "triton", "on a GPU"
    if device.type != "cpu":
        return "eager", f"on {device.type}, for which there is no faster one"
    if num_elements < WORTH_COMPILING:
        return "eager", f"{num_elements:,} float32 elements are too few to compile for"
    return "compiled", f"{num_elements:,} float32 elements on a CPU"


def _check_device(way: str, device: torch.device) -> None:
    """Raise ValueError where a way does not go with the device of the parameters."""
    if way == "compiled" and device.type != "cpu":
        raise ValueError(
            f"implementation: 'compiled' is for a CPU, found parameters on {device.type}; "
            "allowed: 'triton' and 'eager'"
        )
    if way == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("implementation: 'triton' is not installed; allowed: 'eager'")
        from operators.kernels.triton_optimizer import interpreted

        if device.type != "cuda" and not interpreted():
            raise ValueError(
                f"implementation: 'triton' needs a GPU, found parameters on {device.type}; "
                "allowed: 'compiled' and 'eager'"
            )


def _triton() -> OptimizerKernels:
    """Triton's kernels, which are imported only where they are wanted."""
    from operators.kernels.triton_optimizer import TritonOptimizer

    return TritonOptimizer()
