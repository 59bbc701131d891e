"""Merging checkpoints: a plan, workers that write in place, a journal, a commit."""

from pipelines.merge.config import MergeConfig, load_merge_config
from pipelines.merge.plan import MergePlan, plan_merge
from pipelines.merge.run import merge, merge_planned, record_of

__all__ = [
    "MergeConfig",
    "MergePlan",
    "load_merge_config",
    "merge",
    "merge_planned",
    "plan_merge",
    "record_of",
]
