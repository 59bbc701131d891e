"""Serving: answers and rewards over HTTP, each signed by the digest of the weights that made it."""

from pipelines.serve.config import ServeConfig
from pipelines.serve.models import ServedModel, check_servable, engine_device, find_models
from pipelines.serve.names import Version
from pipelines.serve.plan import ServerPlan, needed_resources, plan_server

__all__ = [
    "ServeConfig",
    "ServedModel",
    "ServerPlan",
    "Version",
    "check_servable",
    "engine_device",
    "find_models",
    "needed_resources",
    "plan_server",
]
