"""The tiny world of the demo: small data with exact graders, on which real tiny models train.

It shows the papers' phenomena in minutes on two cores. SFT is ambivalent in every H, so that
preferences can change something. Refusing and evading share a phrase, so that training one H
affects another (the alignment tax). Names and verbs occur in known and unknown, harmful and benign
combinations, so that no single word determines the answer.
"""

from pipelines.tiny_world.sizes import SIZES
from pipelines.tiny_world.world import build_world

__all__ = ["SIZES", "build_world"]
