"""Pipelines: commands as stages of one file, with what they need of each other."""

from pipelines.pipeline.config import PipelineConfig, StageConfig
from pipelines.pipeline.plan import Job, Kind, PipelinePlan, Stage, plan_pipeline
from pipelines.pipeline.run import is_standing, run_pipeline
from pipelines.pipeline.state import StageRecord, State

__all__ = [
    "Job",
    "Kind",
    "PipelineConfig",
    "PipelinePlan",
    "Stage",
    "StageConfig",
    "StageRecord",
    "State",
    "is_standing",
    "plan_pipeline",
    "run_pipeline",
]
