"""Merges whose coefficients are learned (DAM)."""

from pipelines.dam.config import DamConfig, Expert
from pipelines.dam.memory import Memory, estimate_memory
from pipelines.dam.run import Plan, check_dam, dam, plan_dam

__all__ = [
    "DamConfig",
    "Expert",
    "Memory",
    "Plan",
    "check_dam",
    "dam",
    "estimate_memory",
    "plan_dam",
]
