"""Rewards: raw scores of responses by a sequence classification model, and what they say."""

from pipelines.rewards.config import ScoreConfig
from pipelines.rewards.scoring import ScorePlan, plan_scores, score

__all__ = ["ScoreConfig", "ScorePlan", "plan_scores", "score"]
