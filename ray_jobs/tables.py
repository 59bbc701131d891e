"""Tables and numbers on stdout: as wide as the terminal, or wide enough for whole names in a
file or pipe."""

import math
import sys

from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 200


def print_table(table: Table) -> None:
    """Print a table; in a file or pipe, no name is cut."""
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


def known(number: float) -> float | None:
    """A number that may be NaN, which JSON does not have."""
    return None if math.isnan(number) else number
