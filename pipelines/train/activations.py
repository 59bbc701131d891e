"""Activations that rest in CPU memory between a forward pass and its backward pass."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def offload_activations() -> AbstractContextManager[object]:
    """What autograd keeps in the block goes to CPU memory, and comes back when it is needed.

    As `torch.autograd.graph.save_on_cpu`, but parameters stay where they are: they are held
    anyhow, or gathered again by their sharding. With gradient checkpointing it is the inputs of the
    blocks that go. Copies are exact, so gradients are the same to the last bit.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return tensor  # or a view of one, as a linear layer keeps its weight transposed
    pinned = tensor.is_cuda
    # With the same strides, or other kernels would run on it.
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    # In the order of the stream, like the passes themselves: nothing has to wait for it.
    return tensor.device, copy.copy_(tensor, non_blocking=pinned)


def _unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, copy = packed
    return copy.to(device, non_blocking=copy.is_pinned())
