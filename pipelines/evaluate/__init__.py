"""Measure models on tasks with exact graders: the matrix of `poise evaluate`."""

from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import best_model, evaluate, evaluate_together, summarise

__all__ = ["EvaluateConfig", "best_model", "evaluate", "evaluate_together", "summarise"]
