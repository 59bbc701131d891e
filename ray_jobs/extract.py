"""`poise extract-lora`: the difference of two checkpoints as a low-rank adapter."""

import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.config import check
from pipelines.extract import ExtractConfig, extract
from pipelines.provenance import read_record
from pipelines.storage import resolve_output
from ray_jobs.tables import print_table

NUM_SHOWN = 10
ENOUGH = 0.95  # of the delta's norm; below it a warning is printed


def run_extract(settings: dict[str, Any], out: Path, *, force: bool, strict: bool) -> None:
    """Extract an adapter; print what it keeps on stdout, what it leaves out on stderr."""
    config = check(settings, ExtractConfig, "extract-lora")
    place = extract(config, resolve_output(out, None), force=force, strict=strict)
    record = read_record(place)
    assert record is not None
    print_table(_table(record))
    for line in warnings(record):
        print(line, file=sys.stderr)
    print(f"extracted adapter: {place}", file=sys.stderr)


def warnings(record: dict[str, Any]) -> list[str]:
    """The changes that the adapter does not hold: one line for each kind."""
    lines = [f"warning: {line}; left out" for line in record["unmatched"]]
    for kind, found in record["left_out"].items():
        modules = found["modules"][:4] + ["..."] * (len(found["modules"]) > 4)
        named = modules[0] if len(modules) == 1 else "MODULE"
        lines.append(
            f"warning: {kind}: {found['tensors']} changed ({', '.join(modules)}), left out: "
            f"{found['share']:.2%} of the delta's norm; --whole {named} saves a module as it is"
        )
    kept = record["extracted"]["kept"]
    if kept < ENOUGH:
        lines.append(
            f"warning: the factors keep {kept:.2%} of the norm of the linear layers' delta; a "
            "larger --rank (or --energy) keeps more"
        )
    return lines


def _table(record: dict[str, Any]) -> Table:
    """The modules with the largest relative loss, and the totals."""
    modules = sorted(record["modules"].items(), key=lambda each: each[1]["kept"])
    title = f"the {NUM_SHOWN} modules that keep least" if len(modules) > NUM_SHOWN else None
    table = Table("module", "rank", "|delta|", "kept", "error", "cosine", title=title)
    shown = modules[:NUM_SHOWN]
    for number, (name, found) in enumerate(shown, start=1):
        cells = [name, str(found["rank"]), f"{found['delta']:.4g}", *_told(found)]
        table.add_row(*cells, end_section=number == len(shown))
    ranks = [found["rank"] for _, found in modules]
    span = str(max(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"
    table.add_row(f"all {len(modules)} modules", span, "", *_told(record["extracted"]))
    table.add_row("all tensors", "", "", *_told(record["all_tensors"]))
    return table


def _told(found: dict[str, float]) -> list[str]:
    return [f"{found['kept']:.2%}", f"{found['error']:.3g}", f"{found['cosine']:+.4f}"]
