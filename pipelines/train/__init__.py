"""Alignment training under Ray Train."""

from pipelines.train.config import AlignConfig
from pipelines.train.run import align, plan_alignment

__all__ = ["AlignConfig", "align", "plan_alignment"]
