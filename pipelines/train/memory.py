"""The memory that a run needs on each worker, by formula, before anything is loaded.

With N parameters, W workers, b bytes per number in forward and backward passes (4, or 2 in bf16), T
tokens in a micro-batch, layers of width h and inner width i, and a vocabulary of v:

    state         4 N of master weights, 8 N of Adam's moments, 2 N of tau (OnDARE; OnTIES with
                  density p: 6 p N, at most 2 N; 0 if tau is not kept on the device), 4 N of the
                  anchor (step-K), 8 N with a moving average (its gap, and the weights before a
                  step); divided by W unless the strategy is single or ddp. With adapters of A
                  elements: 4 N + 12 A, and A instead of N for gradients
    weights       b N more, if the passes use other weights than the master weights
    gradients     4 N (divided by W for fsdp2, zero2, zero3); twice that for ddp; b N + 4 N / W for
                  zero1
    gathered      fsdp2: b times (two largest blocks + everything outside the blocks), and b + 4
                  times the larger of one block and everything outside (its gradient, and the copy
                  that is reduced). zero3: b times as much, or 10^9 elements, which DeepSpeed keeps,
                  or N. zero*: b times the bucket of gradients, 5 * 10^7 elements or N
    activations   b T (15 h + 4 i) per layer; with gradient checkpointing b T h per layer and one
                  full layer; with activation offload one full layer (the rest in host memory)
    logits        T v (b + 12), and 4 T v more in bf16 for their float32 copy. By chunks of c
                  positions (c = 2^26 / v unless given) c instead of T where that is less, and
                  (b + 4) v h for a chunk's gradient of the head and their sum, if not frozen
    reference     on the fly: 4 N of its weights, divided by W unless the strategy is single or ddp,
                  which hold 2 N more in bf16 (0 if it is the base of adapters), and b T v of its
                  logits; by chunks b c v, and b times everything outside the blocks if it is
                  divided
    host          in host memory beside a GPU: state and gradients with CPU offload, tau if it is
                  kept there, activations with activation offload
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from pipelines.train.architecture import RewardHead, blocks_of, head_of, meta_model
from pipelines.train.config import AlignConfig, LoraSettings
from pipelines.train.head import chunk_of
from pipelines.train.optimizer_config import ONLINE, OptimizerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's sizes, for the formula."""

    num_parameters: int
    largest_block: int  # parameters
    outside_blocks: int  # parameters of embeddings, last norm and head
    num_layers: int
    hidden_size: int
    inner_size: int
    vocabulary: int
    # Last name of linear layers -> sum of inputs and outputs, which times the rank is the adapters'
    # number of elements.
    adapted: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)  # of matrices by their full names

    def num_adapter_elements(self, lora: LoraSettings) -> int:
        """Elements that adapters train."""
        chosen = self.adapted if lora.target_modules == "all-linear" else lora.target_modules
        layers = sum(self.adapted.get(name, 0) for name in chosen)
        ends = tuple(f".{name}" for name in lora.target_parameters)
        others = sum(n for name, n in self.parameters.items() if f".{name}".endswith(ends))
        return lora.rank * (layers + others)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each worker; all except `host` are on the model's device."""

    state: int
    weights: int
    gradients: int
    gathered: int
    activations: int
    logits: int
    reference: int
    host: int

    @property
    def total(self) -> int:
        """All except `host`: the peak, which is reached in a backward pass."""
        return sum(getattr(self, each.name) for each in fields(self)) - self.host


def shape_of(model: str | Path, head: RewardHead | None = None) -> ModelShape:
    """A model's sizes from its config; the model is built without memory.

    Args:
        head: of a reward model, whose head is a vocabulary of one.

    Raises:
        InputError: the config is not of such a model.
    """
    empty = meta_model(Path(model), head)
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(empty)]
    total = sum(p.numel() for p in empty.parameters())
    config = empty.config.get_text_config()
    return ModelShape(
        num_parameters=total,
        largest_block=max(blocks, default=total),
        outside_blocks=total - sum(blocks),
        num_layers=len(blocks),
        hidden_size=config.hidden_size,
        inner_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size if head is None else 1,
        adapted=_adapted(empty),
        parameters={
            name: prod(parameter.shape[:-2]) * sum(parameter.shape[-2:])
            for name, parameter in empty.named_parameters()
            if parameter.dim() in (2, 3)
        },
    )


def _adapted(model: "PreTrainedModel") -> dict[str, int]:
    """Inputs plus outputs of the linear layers except the head, summed by their last names."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head_of(model):
            last = name.rpartition(".")[2]
            found[last] = found.get(last, 0) + module.in_features + module.out_features
    return found


def estimate_memory(shape: ModelShape, config: AlignConfig, length: int | None = None) -> Memory:
    """The formula above.

    Args:
        length: tokens of the longest sequence; the config's `max_length` unless given.
    """
    n, workers, traits = shape.num_parameters, config.num_workers, config.traits
    b = 2 if config.precision == "bf16" else 4
    trained = n if config.lora is None else shape.num_adapter_elements(config.lora)
    share = workers if traits.is_sharded else 1
    tau = _tau_bytes(config.optimizer, n) // share
    tau_on_host = config.optimizer.delta_placement == "host"
    state = (12 * trained + (0 if config.lora is None else 4 * n)) // share
    state += 0 if tau_on_host else tau
    if config.optimizer.merge_every > 1:
        state += 4 * n // share
    if config.optimizer.ema is not None:
        state += 8 * n // share
    host = tau if tau_on_host else 0
    weights = traits.weight_bytes(n, b, workers)
    gradients = traits.gradient_bytes(trained, b, workers)
    if config.cpu_offload:
        host, state, gradients = host + state + gradients, 0, 0
    gathered = traits.gathered_bytes(shape, b)
    sequences = config.objective.row_kind.sequences_per_row
    rows = config.micro_batch_size or config.global_batch_size // workers
    tokens = rows * sequences * (length or config.max_length)
    layer = b * tokens * (15 * shape.hidden_size + 4 * shape.inner_size)
    activations = layer * shape.num_layers
    if config.gradient_checkpointing:
        activations = b * tokens * shape.hidden_size * shape.num_layers + layer
    if config.activation_offload:
        host, activations = host + activations, layer
    positions = min(tokens, config.logits_chunk or chunk_of(shape.vocabulary))
    logits = positions * shape.vocabulary * (b + 12 + (4 if b == 2 else 0))
    if positions < tokens and config.lora is None:
        logits += (b + 4) * shape.vocabulary * shape.hidden_size
    reference = 0
    if config.reference_log_probabilities == "on_the_fly":
        reference = b * positions * shape.vocabulary
        if config.lora is None or config.reference_model is not None:
            reference += 4 * n // workers if traits.is_sharded else (6 if b == 2 else 4) * n
            if positions < tokens and traits.is_sharded:
                reference += b * shape.outside_blocks
    return Memory(state, weights, gradients, gathered, activations, logits, reference, host)


def _tau_bytes(optimizer: OptimizerConfig, num_parameters: int) -> int:
    """Bytes of the kept tau in bf16: dense, or sparse with indices for sparsifiers with cuts."""
    if optimizer.name not in ONLINE or optimizer.delta_placement == "source":
        return 0
    assert optimizer.density is not None
    sparse = optimizer.name == "onties" or (
        optimizer.name == "online" and optimizer.merge_options.needs == "threshold"
    )
    kept = min(2.0, 6 * optimizer.density) if sparse else 2.0
    return round(kept * num_parameters)
