"""Packing: whether rows in one sequence can be kept apart, by what the model is and by a test."""

import inspect
import re

import torch
from torch import Tensor, nn

from pipelines.errors import InputError
from pipelines.train.architecture import class_name

# Modules that carry something from each position to all later ones, whatever an attention mask
# says: state spaces, recurrences, linear attention, convolutions over positions.
CARRIES = re.compile(
    "mamba|rwkv|recurrent|rglru|lstm|deltanet|linearattention|lightningattention|shortconv|"
    "retention|hyena|conv1d",
    re.IGNORECASE,
)
_NOT = {"Conv1D"}  # GPT-2's linear layers
# Of what a visible row changes, the part that rounding may change.
BY_ROUNDING = {"float32": 1e-4, "bf16": 0.2}
LENGTH = 12


def check_packing(model: nn.Module) -> None:
    """Raise InputError if the architecture is known to carry rows into each other, or takes no
    positions.
    """
    name = type(model).__name__
    for module in model.modules():
        kind = type(module).__name__
        if kind not in _NOT and (isinstance(module, nn.Conv1d) or CARRIES.search(kind)):
            raise InputError(
                f"packing: found {name}, whose {kind} carries each row of a sequence into the "
                "next one; allowed with it: false"
            )
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise InputError(f"packing: found {name}, which takes no positions; allowed with it: false")


@torch.no_grad()
def check_rows_apart(
    model: nn.Module, vocabulary: int, precision: str, device: torch.device
) -> None:
    """Run two rows in one sequence, and the second one alone: it must have the same logits. All
    ranks of a sharded model call together.

    Args:
        vocabulary: the number of tokens that may be drawn.

    Raises:
        InputError: the second row sees the first one, or has other positions.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, 2 * LENGTH), generator=draw).to(device)
    places = torch.arange(LENGTH, device=device).repeat(2)[None]

    def logits(tokens: Tensor, **positions: Tensor) -> Tensor:
        found = model(input_ids=tokens, use_cache=False, **positions).logits
        return found[0, -LENGTH:].float()

    alone = logits(ids[:, LENGTH:])
    packed, seen = logits(ids, position_ids=places), logits(ids)
    change, whole = (float((each - alone).abs().mean()) for each in (packed, seen))
    if not change <= BY_ROUNDING[precision] * whole:
        name = class_name(model)
        raise InputError(
            f"packing: {name} lets a row see the row before it in its sequence (its logits change "
            f"by {change:.2g}); allowed with it: false"
        )
