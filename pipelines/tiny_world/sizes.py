"""The sizes of the tiny world and the lengths of its trainings."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """Model and training for one size of the world; steps are optimizer steps."""

    hidden_size: int
    num_layers: int
    base_steps: int
    base_learning_rate: float
    sft_steps: int
    sft_learning_rate: float
    num_known_people: int = 150


SIZES = {
    "smoke": Size(96, 3, 1200, 4e-3, 600, 2e-3),
    "default": Size(96, 3, 2200, 4e-3, 600, 2e-3),
    "rich": Size(128, 4, 4500, 3e-3, 1400, 1.5e-3),
}
