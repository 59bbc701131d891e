"""Which path an optimizer's arithmetic takes: by size, and by what the machine has."""

import importlib.util
import logging
from typing import Literal

import torch

from operators.native import CompilerError
from operators.optim.fast import Kernels
from operators.optim.native import NativeKernels

Implementation = Literal["auto", "reference", "compiled", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "compiled", "triton")
# Elements of the model, so that no sharding changes the path: below, compiling is not made good.
WORTH_COMPILING = 1 << 20
_LOG = logging.getLogger(__name__)


def choose_path(
    wanted: Implementation, device: torch.device, size: int
) -> tuple[str, Kernels | None]:
    """The path to take and its passes (None: the reference path); logs it.

    Args:
        wanted: what was asked for.
        device: of the parameters.
        size: their float32 elements, on all ranks together.

    Raises:
        ValueError: a path was asked for that this machine cannot take.
    """
    path, reason = wanted, "as asked for"
    if wanted == "auto":
        path, reason = _worth(device, size)
    kernels: Kernels | None = None
    if path == "triton":
        kernels = _triton(device)
    elif path == "compiled":
        try:
            kernels = _compiled(device)
        except CompilerError as error:
            if wanted != "auto":
                raise ValueError(
                    f"implementation: 'compiled' does not work here ({error}); "
                    "allowed: 'reference', or install a C compiler"
                ) from error
            path, reason = "reference", str(error)
    _LOG.info("online merging: %s path, %s", path, reason)
    return path, kernels


def _worth(device: torch.device, size: int) -> tuple[Implementation, str]:
    """What `auto` takes for so many float32 elements, and why."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        return "triton", "on a GPU"
    if device.type != "cpu":
        return "reference", f"on {device.type}, for which there is no faster one"
    if size < WORTH_COMPILING:
        return "reference", f"{size:,} float32 elements are too few to compile for"
    return "compiled", f"{size:,} float32 elements on a CPU"


def _compiled(device: torch.device) -> Kernels:
    """The passes in C, where they can run.

    Raises:
        CompilerError: no C compiler works here.
        ValueError: the parameters are not on a CPU.
    """
    if device.type != "cpu":
        raise ValueError(
            f"implementation: 'compiled' is for a CPU, found parameters on {device.type}; "
            "allowed: 'triton' and 'reference'"
        )
    return NativeKernels()


def _triton(device: torch.device) -> Kernels:
    """Triton's kernels, where they can run."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("implementation: 'triton' is not installed; allowed: 'reference'")
    from operators.optim.triton_kernels import TritonKernels, interpreted

    if device.type != "cuda" and not interpreted():
        raise ValueError(
            f"implementation: 'triton' needs a GPU, found parameters on {device.type}; "
            "allowed: 'compiled' and 'reference'"
        )
    return TritonKernels()
