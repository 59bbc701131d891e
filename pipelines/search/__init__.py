"""Search: candidates are merged in memory, measured by a warm engine, and raced; a study chooses
among them.
"""

from pipelines.search.config import StudyConfig
from pipelines.search.driving import Search
from pipelines.search.measurement import Measurement, Measurer
from pipelines.search.plan import StudyPlan, plan_study
from pipelines.search.racing import Bound, Objective, Race
from pipelines.search.run import search

__all__ = [
    "Bound",
    "Measurement",
    "Measurer",
    "Objective",
    "Race",
    "Search",
    "StudyConfig",
    "StudyPlan",
    "plan_study",
    "search",
]
