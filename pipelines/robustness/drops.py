"""The drop rate (PDR of PromptBench, Zhu et al. 2023): what share of its score a model loses under
an attack, with an error that is paired by document.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.evaluate.interface import Sample
from pipelines.evaluate.statistics import Contrast, Estimates
from pipelines.robustness.task import AttackedTask

_ROWS = ("unattacked", "attacked")


@dataclass(frozen=True, slots=True)
class Drop:
    """A metric without and under an attack.

    Attributes:
        rate: 100 (M - M_attacked) / M in percent, which is negative where the attack helps; None
            where M is 0.
        n: documents.
    """

    unattacked: float
    attacked: float
    rate: Contrast | None
    n: int


def drop(estimates: Estimates) -> Drop:
    """The drop of two numbers of the same documents.

    The error is that of the first terms of the rate's Taylor series (the delta method): with
    r = 1 - A/M, dr = (A/M^2) dM - dA/M, where dM and dA go together.

    Args:
        estimates: of the rows "unattacked" and "attacked".
    """
    m, a = (estimates.value(row).value for row in _ROWS)
    if m == 0:
        return Drop(m, a, None, estimates.n)
    linear = estimates.contrast({"unattacked": 100 * a / m**2, "attacked": -100 / m})
    return Drop(m, a, Contrast(100 * (m - a) / m, linear.stderr), estimates.n)


def drops(
    task: AttackedTask, unattacked: Sequence[Sample], attacked: Sequence[Sample]
) -> dict[str, Drop]:
    """The drop of each metric of which more is better."""
    joint = task.of.estimates(dict(zip(_ROWS, (unattacked, attacked), strict=True)))
    return {name: drop(joint[name]) for name in task.of.rising_metrics if name in joint}


def plain(found: Drop) -> dict[str, float | int | None]:
    """A drop for JSON, which has no NaN."""
    rate, error = (found.rate.value, found.rate.stderr) if found.rate else (None, None)
    return {
        "unattacked": found.unattacked,
        "attacked": found.attacked,
        "drop_rate": rate,
        "stderr": None if error is None or math.isnan(error) else error,
        "n": found.n,
    }
