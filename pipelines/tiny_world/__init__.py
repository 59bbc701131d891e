"""The embedded default: a small world with exact graders, in which real tiny models are trained.

It is designed so that the papers' phenomena can be seen in minutes on two cores. SFT is ambivalent
in every strength, so that preferences have something to move; refusing and evading share a phrase,
so that training one strength touches another (the alignment tax); names and verbs recur in known
and unknown, harmful and benign combinations, so that no single word gives the answer away.
"""

from pipelines.tiny_world.sizes import SIZES
from pipelines.tiny_world.training import train_base
from pipelines.tiny_world.world import build_world

__all__ = ["SIZES", "build_world", "train_base"]
