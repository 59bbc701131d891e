"""Serving finished checkpoints through an OpenAI-compatible API with Ray Serve and vLLM."""

from pipelines.serve.app import build_app, check_servable, engine_device, needed_resources
from pipelines.serve.models import ServedModel, find_models

__all__ = [
    "ServedModel",
    "build_app",
    "check_servable",
    "engine_device",
    "find_models",
    "needed_resources",
]
