"""Tasks of lm-evaluation-harness on our engines: its library builds the requests, filters and
scores, an engine answers.
"""

from pipelines.evaluate.harness.evaluation import (
    TaskResult,
    chat_template_of,
    measure_range,
    measure_tasks,
    requests_of,
)
from pipelines.evaluate.harness.loading import (
    LIBRARY_SEED,
    TaskSet,
    load_tasks,
    load_tasks_and_averages,
)
from pipelines.evaluate.harness.requests import Answer, LongPrompts, Request, answered
from pipelines.evaluate.harness.results import harness_results, write_harness_json
from pipelines.evaluate.harness.splits import Split
from pipelines.evaluate.harness.tasks import Chat, ChatTemplate, Metric, Score, Task

__all__ = [
    "LIBRARY_SEED",
    "Answer",
    "Chat",
    "ChatTemplate",
    "LongPrompts",
    "Metric",
    "Request",
    "Score",
    "Split",
    "Task",
    "TaskResult",
    "TaskSet",
    "answered",
    "chat_template_of",
    "harness_results",
    "load_tasks",
    "load_tasks_and_averages",
    "measure_range",
    "measure_tasks",
    "requests_of",
    "write_harness_json",
]
