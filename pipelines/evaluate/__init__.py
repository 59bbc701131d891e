"""Measure models on tasks with exact graders: the matrix (models x tasks) of `poise evaluate`."""

from pipelines.evaluate.plan import EvaluateConfig, plan_evaluation
from pipelines.evaluate.run import (
    best_model,
    evaluate,
    evaluate_planned,
    evaluate_together,
    summarise,
)

__all__ = [
    "EvaluateConfig",
    "best_model",
    "evaluate",
    "evaluate_planned",
    "evaluate_together",
    "plan_evaluation",
    "summarise",
]
