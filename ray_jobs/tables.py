"""Tables on stdout: as wide as the terminal, or wide enough for whole names in a file or pipe."""

import sys

from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 200


def print_table(table: Table) -> None:
    """Print a table; no name in it is cut where nobody looks at a terminal."""
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)
