"""What a storage holds: what runs, what stands, what failed and why."""

from pipelines.status.items import Item, items_of, old_runs
from pipelines.status.listing import File, Storage
from pipelines.status.pipelines import PipelineStatus, pipelines_of

__all__ = [
    "File",
    "Item",
    "PipelineStatus",
    "Storage",
    "items_of",
    "old_runs",
    "pipelines_of",
]
