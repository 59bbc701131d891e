"""Measure models on tasks: the matrix (models x tasks) of `poise evaluate`, filled block by block
into a store, by engines that change models.
"""

from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.plan import EvaluationPlan, plan_evaluation
from pipelines.evaluate.run import evaluate, evaluate_planned, evaluate_together
from pipelines.evaluate.summary import best_model, percentages

__all__ = [
    "EvaluateConfig",
    "EvaluationPlan",
    "best_model",
    "evaluate",
    "evaluate_planned",
    "evaluate_together",
    "percentages",
    "plan_evaluation",
]
