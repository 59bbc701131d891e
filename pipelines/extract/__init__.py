"""Extracting a low-rank adapter from two checkpoints: plan, factors, commit."""

from pipelines.extract.plan import ExtractConfig, ExtractPlan, plan_extraction
from pipelines.extract.run import extract, extract_planned

__all__ = ["ExtractConfig", "ExtractPlan", "extract", "extract_planned", "plan_extraction"]
