"""`poise diff`: the differences of two models, tensor by tensor."""

import json
import sys
from dataclasses import asdict

from rich.table import Table

from pipelines.checkpoints import pinned_model
from pipelines.merge.diff import TensorDiff, diff_models, unmatched
from pipelines.rounding import ENOUGH
from ray_jobs.tables import print_table

NUM_SHOWN = 40


def run_diff(a: str, b: str, base: str | None, *, as_json: bool) -> None:
    """Compare two models; print the result on stdout, and tensors without a match on stderr."""
    base = None if base is None else pinned_model(base)
    a, b = pinned_model(a, base), pinned_model(b, base)
    found = diff_models(a, b, base)
    for line in unmatched(a, b, base):
        print(line, file=sys.stderr)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    kept = found[-1].kept
    if kept is not None:
        print(
            f"rounding: of a change as large as that of {b} from {base or a}, its dtype keeps a "
            f"cosine of about {kept:.4f}{'' if kept >= ENOUGH else ': much of it may be rounding'}",
            file=sys.stderr,
        )
    print_table(_table(found, has_base=base is not None))


def _table(found: list[TensorDiff], *, has_base: bool) -> Table:
    """A table of the tensors that differ most, and of all together."""
    *tensors, total = found
    tensors = sorted(tensors, key=lambda each: -each.relative)
    columns = ["tensor", "elements", "|B - A|", "/ |A|", "cosine"]
    if has_base:
        columns = [*columns[:4], "|A - base|", "|B - base|", "cosine of deltas", "sign conflicts"]
    title = f"the {NUM_SHOWN} tensors that differ most" if len(tensors) > NUM_SHOWN else None
    table = Table(*columns, title=title)
    for each in [*tensors[:NUM_SHOWN], total]:
        cells = [each.name, f"{each.num_elements:,}", f"{each.delta:.4g}", f"{each.relative:.2%}"]
        if each.norms is not None:
            cells += [f"{norm:.4g}" for norm in each.norms]
        cells.append(f"{each.cosine:+.4f}")
        if each.conflict is not None:
            cells.append(f"{each.conflict:.1%}")
        table.add_row(*cells, end_section=each is tensors[min(len(tensors), NUM_SHOWN) - 1])
    return table
