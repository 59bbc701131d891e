"""The page of a set of runs: one HTML file that needs nothing else, put together from a template,
style sheets, scripts and the data as JSON.

A policy in the page (Content-Security-Policy) allows its own style and script by their hashes, and
no request. Scripts write all names and samples as text, never as HTML.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from pipelines.report.colours import LEVELS, cell_rules
from pipelines.report.lineage import Origin
from pipelines.report.matrix import UNKNOWN, Matrix

TEMPLATE = "page.html"
STYLES = ("page.css", "parts.css")
SCRIPTS = ("core.js", "scores.js", "grid.js", "scatter.js", "radar.js", "samples.js", "models.js",
           "main.js")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page shows.

    Attributes:
        title, about: its heading, and a line below it.
        matrix: the numbers.
        kinds: of the rows, such as "merged"; empty where not known.
        notes: lines below some rows' names.
        marked: a row with a mark and what the mark says.
        reference: the row that others are compared with at first.
        axes: the two columns of the trade-off at first.
        findings: (topic, sentence).
        findings_note: what the errors in the sentences are.
        samples: of `chosen_samples`; None: there are none.
        origins: of the rows, and of their ancestors.
        runs: of `described`.
        configs: path -> text, with the models made with it.
        timings_s: step -> seconds.
        versions: package -> version.
    """

    title: str
    about: str
    matrix: Matrix
    kinds: Sequence[str]
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    marked: tuple[str, str] | None = None
    reference: int = 0
    axes: tuple[int, int]
    findings: Sequence[Sequence[str]] = ()
    findings_note: str = ""
    samples: Mapping[str, Any] | None = None
    origins: Sequence[Origin] = ()
    runs: Sequence[Mapping[str, Any]] = ()
    configs: Sequence[Mapping[str, Any]] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def render_page(page: Page) -> str:
    """The page's HTML; equal pages give equal text."""
    folder = Path(__file__).parent
    style = "\n".join([*(_text(folder / name) for name in STYLES), cell_rules()])
    parts = "\n".join(_text(folder / name) for name in SCRIPTS)
    script = f'"use strict";\n(() => {{\n{parts}\n}})();'
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return environment.get_template(TEMPLATE).render(
        title=page.title,
        about=page.about,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        data=Markup(_json(_content(page))),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(content: Any) -> str:
    """JSON that can stand in a script element: no character in it begins a tag or ends a line."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone half of a surrogate pair, which a broken answer may hold, has no form in UTF-8.
    text = text.encode("utf-8", "replace").decode()
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _content(page: Page) -> dict[str, Any]:
    """What the scripts read."""
    matrix = page.matrix
    first, second = np.triu_indices(len(matrix.rows), 1)
    x, y = np.triu_indices(len(matrix.columns), 1)
    errors = [of[first, second] for of in matrix.pairs]
    has_support = bool((matrix.support != UNKNOWN).any())
    return {
        "levels": LEVELS,
        "rows": [
            {
                "name": name,
                "kind": kind,
                "notes": list(page.notes.get(name, ())),
                "mark": page.marked[1] if page.marked and page.marked[0] == name else "",
            }
            for name, kind in zip(matrix.rows, page.kinds, strict=True)
        ],
        "columns": [
            {
                **asdict(column),
                "percent": column.is_percent,
                "bounds": column.bounds and [each * column.scale for each in column.bounds],
                "pairs": _packed(of, "<f4") if np.isfinite(of).any() else None,
            }
            for column, of in zip(matrix.columns, errors, strict=True)
        ],
        "values": _packed(matrix.values, "<f4"),
        "stderrs": _packed(matrix.stderrs, "<f4"),
        "fences": _packed(matrix.fences(), "<f4"),
        "support": _packed(matrix.support[x, y], "<u2") if has_support else None,
        "draws": matrix.num_draws,
        "reference": page.reference,
        "axes": list(page.axes),
        "findings": [list(each) for each in page.findings],
        "findings_note": page.findings_note,
        "samples": page.samples,
        "origins": [asdict(each) for each in page.origins],
        "runs": list(page.runs),
        "configs": list(page.configs),
        "timings": list(page.timings_s.items()),
        "versions": list(page.versions.items()),
    }


def _packed(numbers: NDArray[Any], dtype: str) -> str:
    """Numbers row by row as base64 of their little-endian bytes."""
    return base64.b64encode(np.ascontiguousarray(numbers.astype(dtype)).tobytes()).decode()
