"""Extrapolation beyond an aligned model."""

from torch import Tensor

from operators.merging.method import MergeInput


def expo(work: MergeInput) -> Tensor:
    """ExPO (Zheng et al. 2024, eq. 2): `W_1 + alpha (W_1 - W_0)`, W_0 = SFT, W_1 = aligned."""
    [aligned], [delta] = work.models, work.deltas()
    return aligned.add(delta, alpha=work.parameters["alpha"])
