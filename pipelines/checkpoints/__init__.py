"""Hugging Face checkpoints on disk: lazy reading by range, and writing in place."""

from pipelines.checkpoints.models import open_model, pinned_model, unadapted
from pipelines.checkpoints.module_view import CheckpointDelta, ModuleView
from pipelines.checkpoints.reader import Checkpoint
from pipelines.checkpoints.safetensors_header import StoredTensor
from pipelines.checkpoints.source import Source, TensorSpec
from pipelines.checkpoints.writer import OutputLayout, plan_layout

__all__ = [
    "Checkpoint",
    "CheckpointDelta",
    "ModuleView",
    "OutputLayout",
    "Source",
    "StoredTensor",
    "TensorSpec",
    "open_model",
    "pinned_model",
    "plan_layout",
    "unadapted",
]
