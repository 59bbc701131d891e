"""Whether a model reads ahead, by a test: with attention in both directions, what is to be learned
could be seen.
"""

import torch
from torch import nn

from pipelines.errors import InputError
from pipelines.train.architecture import class_name
from pipelines.train.data import TokenTable

LENGTH = 12
# Of the logits, the part that rounding may change: the positions before have the same inputs.
BY_ROUNDING = {"float32": 1e-4, "bf16": 0.02}


@torch.no_grad()
def check_reads_back(
    model: nn.Module, table: TokenTable, precision: str, device: torch.device
) -> None:
    """Run the first tokens of a row, then again with another last one: the logits before it must be
    the same. All ranks of a sharded model call together.

    Raises:
        InputError: they are others, so positions see later tokens.
    """
    ids = table.sequences(int(table.lengths[:, 0].argmax()))[0][0][:LENGTH].astype("int64")
    other = ids.copy()
    other[-1] = next((token for token in ids[::-1] if token != ids[-1]), int(ids[-1] == 0))
    first, second = (
        model(input_ids=torch.from_numpy(each[None]).to(device), use_cache=False).logits[:, :-1]
        for each in (ids, other)
    )
    change, whole = float((first - second).abs().mean()), float(first.abs().mean())
    if not change <= BY_ROUNDING[precision] * whole:
        raise InputError(
            f"model: found {class_name(model)}, in which a token sees later ones of its row "
            f"(another last token changes the logits before it by {change:.2g}); allowed: models "
            "that read from left to right"
        )
