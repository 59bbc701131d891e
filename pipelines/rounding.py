"""What the written dtype keeps of a change: the field `rounding` of a record, and its lines.

    dtype         that is written; of those with less bits than float32, if there are any
    origin        what the change is measured from
    norm          |w| / |e|: e is the change as computed, w as written (operators/rounding.py)
    cosine        between e and w
    kept          the smallest of norm, 1 / norm and cosine; below `ENOUGH` it is a warning
    exact_norm, written_norm, num_exact, num_written    |e|, |w|, and the elements that are not 0

The sums run over the tensors that are rounded and that changed at all; the last four are null where
no tensor is rounded.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from operators.rounding import Rounding, loses

ENOUGH = 0.95
Row = list[Any]  # tensor, first element, and the five sums of a `Rounding`


def row_of(name: str, start: int, found: Rounding) -> Row:
    """A range's sums as JSON."""
    sums = [found.exact, found.written, found.inner, found.num_exact, found.num_written]
    return [name, start, *sums]


def total_of(rows: Iterable[Row]) -> Rounding:
    """The sums over all tensors that changed, added in the order of their names and elements.
    Tensors with NaN or Inf are left out.
    """
    tensors: dict[str, Rounding] = {}
    ordered = {(str(name), int(start)): sums for name, start, *sums in rows}
    for (name, _), (exact, written, inner, *counts) in sorted(ordered.items()):
        part = Rounding(float(exact), float(written), float(inner), *map(int, counts))
        tensors[name] = tensors.get(name, Rounding()) + part
    total = Rounding()
    for each in tensors.values():
        if each.exact > 0 and math.isfinite(each.exact + each.written + each.inner):
            total += each
    return total


def rounding_record(
    rows: Iterable[Row], dtypes: Iterable[torch.dtype], origin: str
) -> dict[str, Any]:
    """The field `rounding` of a record.

    Args:
        dtypes: of the written tensors.
        origin: what the change is measured from.
    """
    rows, floating = list(rows), {dtype for dtype in dtypes if dtype.is_floating_point}
    small = {dtype for dtype in floating if loses(dtype)}
    total = total_of(rows)
    names = sorted(str(dtype).removeprefix("torch.") for dtype in small or floating)
    found: dict[str, Any] = {
        "dtype": " and ".join(names),
        "origin": origin,
        "norm": total.norm,
        "cosine": total.cosine,
        "kept": total.kept,
    }
    sums = {
        "exact_norm": math.sqrt(total.exact),
        "written_norm": math.sqrt(total.written),
        "num_exact": total.num_exact,
        "num_written": total.num_written,
    }
    return found | (sums if rows else dict.fromkeys(sums))


def rounding_text(found: Mapping[str, Any]) -> str:
    """One line for the terminal and the card."""
    if found["exact_norm"] is None:
        return f"rounding: {found['dtype']} keeps all of the change from {found['origin']}"
    if found["exact_norm"] == 0:
        return f"rounding: no rounded weight differs from {found['origin']}"
    return (
        f"rounding: of the change from {found['origin']}, {found['dtype']} keeps "
        f"{found['norm']:.2%} of the norm, at a cosine of {found['cosine']:+.4f}; it moves "
        f"{found['num_written']:,} of {found['num_exact']:,} changed elements"
    )


def rounding_lines(record: Mapping[str, Any] | None, remedy: str) -> list[str]:
    """The line of a record and, if less than `ENOUGH` is kept, a warning; none for older records.

    Args:
        remedy: the setting that keeps all, such as `out_dtype: float32`.
    """
    found = (record or {}).get("rounding")
    if found is None:
        return []
    lines = [rounding_text(found)]
    if found["kept"] < ENOUGH:
        lines.append(
            f"warning: {found['dtype']} keeps less than {ENOUGH:.0%} of the change; "
            f"{remedy} keeps all of it"
        )
    return lines
