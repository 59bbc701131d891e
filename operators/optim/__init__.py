"""Online merging optimizers: they merge at every training step instead of once at the end."""

from operators.optim.ema import ExponentialMovingAverage
from operators.optim.layout import ShardLayout
from operators.optim.online_merging import OnlineMergingAdamW
from operators.optim.options import MergeOptions
from operators.optim.tau import DeltaSource, MappingDelta, Tau
from operators.optim.wrapper import OnlineMerging

__all__ = [
    "DeltaSource",
    "ExponentialMovingAverage",
    "MappingDelta",
    "MergeOptions",
    "OnlineMerging",
    "OnlineMergingAdamW",
    "ShardLayout",
    "Tau",
]
