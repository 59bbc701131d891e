"""`poise diff --coefficients`: a look at what `poise dam` has learned."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from pipelines.commit import write_atomically
from pipelines.dam.look import expert_names, look_at, plot_means
from pipelines.merge.coefficients import mean_of_files
from ray_jobs.tables import print_table


def run_coefficients(files: list[str], plot: Path | None, *, as_json: bool) -> None:
    """Print means, spread and signs by tensor and expert; of several files those of their mean.

    Raises:
        InputError: a file that holds no coefficients, or files of different experts.
    """
    coefficients = mean_of_files(files)
    found = look_at(coefficients)
    if plot is not None:
        write_atomically(plot, plot_means(found, expert_names(coefficients)))
        print(f"heat map: {plot}", file=sys.stderr)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    table = Table("tensor", "expert", "columns", "mean", "deviation", "least", "most", "below 0")
    for each in found:
        numbers = [f"{x:+.4f}" for x in (each.mean, each.deviation, each.least, each.most)]
        table.add_row(each.tensor, each.expert, f"{each.count:,}", *numbers, f"{each.negative:.1%}")
    print_table(table)
