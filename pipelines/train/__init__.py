"""Alignment training under Ray Train."""

from pipelines.train.config import AlignConfig
from pipelines.train.inputs import check_inputs, remarks
from pipelines.train.run import align, align_in_turn, is_aligned, plan_alignment

__all__ = [
    "AlignConfig",
    "align",
    "align_in_turn",
    "check_inputs",
    "is_aligned",
    "plan_alignment",
    "remarks",
]
