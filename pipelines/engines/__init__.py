"""Engines: one model each, on transformers or vLLM, that answers, scores, and changes weights."""

from pipelines.engines.config import EngineConfig, Need, open_engine
from pipelines.engines.interface import (
    Completion,
    Engine,
    LogLikelihood,
    Piece,
    Sampling,
    answer_seed,
)
from pipelines.engines.live import LiveEngine, open_live
from pipelines.engines.rolling import rolling_log_likelihoods
from pipelines.engines.weights import Weights, inspect, weights_of

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "LiveEngine",
    "LogLikelihood",
    "Need",
    "Piece",
    "Sampling",
    "Weights",
    "answer_seed",
    "inspect",
    "open_engine",
    "open_live",
    "rolling_log_likelihoods",
    "weights_of",
]
