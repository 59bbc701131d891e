"""The policy under training: loading, sharding over the workers, and its log-probabilities."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from operators.losses import token_log_probabilities
from pipelines.train.data import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(path: Path) -> "PreTrainedModel":
    """A causal language model from its checkpoint, in float32: the optimizer's master weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )


def distribute(model: "PreTrainedModel", strategy: str, device: torch.device) -> nn.Module:
    """The model on this worker's device, as the strategy lays it out.

    `fsdp2` shards each block and then the rest by rows over all workers; `ddp` repeats the model
    on each; `single` leaves it alone.
    """
    model.to(device)
    if strategy == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if strategy == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _blocks(model: "PreTrainedModel") -> list[nn.Module]:
    """The repeated blocks of a transformer: the elements of its longest module list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


@contextlib.contextmanager
def reduce_gradients(model: nn.Module, *, now: bool) -> Iterator[None]:
    """Whether backward passes in the block reduce gradients over the workers, or only add up."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)
    yield


def response_log_probabilities(
    model: nn.Module, batch: Batch, *, mean_over_tokens: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chosen and of the rejected responses, each (pairs,) float32.

    Sums over response tokens, or means over them; never over prompts or padding.
    """
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    mask = batch.response[:, 1:]
    values = (token_log_probabilities(logits, batch.ids) * mask).sum(-1)
    if mean_over_tokens:
        values = values / mask.sum(-1)
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def full_state(model: nn.Module) -> dict[str, Any]:
    """All parameters, whole, on the CPU of rank 0 (empty on the others)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def export_model(model: nn.Module, source: Path, folder: Path) -> None:
    """Save the policy on rank 0 as a Hugging Face checkpoint like `source`, tokenizer included.

    Tensors get the dtypes of `source`, and tied weights stay tied. Every rank must call.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = full_state(model)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    plain = AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
    plain.load_state_dict(state)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
