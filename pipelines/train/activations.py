"""Activations in CPU memory until the backward pass."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def offload_activations() -> AbstractContextManager[object]:
    """Tensors that autograd saves in the block move to CPU memory until they are needed.

    As `torch.autograd.graph.save_on_cpu`, but parameters stay on the device, where they are kept
    anyway or gathered again. With gradient checkpointing, only the inputs of the blocks are saved.
    Copies are exact, so gradients have the same bits.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return tensor  # a parameter, or a view of one (a linear layer saves its transposed weight)
    pinned = tensor.is_cuda
    # Keep the strides, because they decide which kernels run.
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    # The copy is in stream order, like the passes, so nothing has to wait for it.
    return tensor.device, copy.copy_(tensor, non_blocking=pinned)


def _unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, copy = packed
    return copy.to(device, non_blocking=copy.is_pinned())
