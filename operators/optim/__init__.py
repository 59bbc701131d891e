"""Online merging optimizers: merge at every step of training instead of once after it."""

from operators.optim.delta import DeltaSource, MappingDelta
from operators.optim.layout import ShardLayout
from operators.optim.online_merging import OnlineMergingAdamW

__all__ = ["DeltaSource", "MappingDelta", "OnlineMergingAdamW", "ShardLayout"]
