"""The choice of an implementation: compiled C, Triton, or eager torch and numpy.

This module chooses for merges and optimizers, by the number of elements and by what the machine
has. A choice is passed on as a value; there is no global switch.
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
# Elements of all tensors together, so that the choice does not depend on the sharding. Compiling
# takes a second; with fewer elements the faster passes save less than that.
WORTH_COMPILING = 1 << 20
Kernels = TypeVar("Kernels")
_LOG = logging.getLogger(__name__)


@cache
def merging_kernels(num_elements: int) -> MergingKernels | None:
    """The kernels for a merge of this many elements on a CPU; None: eager."""
    ways: dict[str, Callable[[], MergingKernels]] = {"compiled": MergingKernels}
    _, kernels = _choose("merging", "auto", torch.device("cpu"), num_elements, ways)
    return kernels


def optimizer_kernels(
    wanted: str, device: torch.device, num_elements: int
) -> tuple[str, OptimizerKernels | None]:
    """The implementation for online merging, and its kernels (None: eager).

    Args:
        wanted: one of `IMPLEMENTATIONS`.
        device: of the parameters.
        num_elements: their float32 elements, on all ranks together.

    Raises:
        ValueError: this machine cannot run the implementation that was asked for.
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
    """The implementation and its kernels (None: eager); the choice is logged."""
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
    """The implementation that `auto` takes for this many elements, and the reason."""
    if device.type == "cuda" and "triton" in ways and importlib.util.find_spec("triton"):
        return "triton", "on a GPU"
    if device.type != "cpu":
        return "eager", f"on {device.type}, where there is no faster one"
    if num_elements < WORTH_COMPILING:
        return "eager", f"{num_elements:,} float32 elements are too few to compile for"
    return "compiled", f"{num_elements:,} float32 elements on a CPU"


def _check_device(way: str, device: torch.device) -> None:
    """Raise ValueError where an implementation cannot run on the parameters' device."""
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
    """Triton's kernels; imported only here, because triton may be missing."""
    from operators.kernels.triton_optimizer import TritonOptimizer

    return TritonOptimizer()
