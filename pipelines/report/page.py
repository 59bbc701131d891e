"""The page of a run: one self-contained HTML file, which works without a network."""

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.report.findings import findings
from pipelines.report.results import COLUMNS, KINDS, Results
from pipelines.report.table import LEGEND, table_rows

TEMPLATE = "page.html"


@dataclass(frozen=True, slots=True)
class _ConfigFile:
    """A config's path in the run's folder, the models made with it, and its text."""

    path: str
    models: tuple[str, ...]
    text: str | None  # None if it is not in the run's folder any more


def render_page(run_folder: Path, results: Results, plots: dict[str, bytes]) -> str:
    """The page's HTML.

    Args:
        run_folder: the folder of the configs that the results name.
        plots: PNG bytes by title, in the order of the page.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        results=results,
        columns=COLUMNS,
        rows=table_rows(results),
        legend=LEGEND.format(sft=results.sft_name),
        findings=[sentence.split(": ", 1) for sentence in findings(results)],
        plots={title: base64.b64encode(png).decode() for title, png in plots.items()},
        tasks=_task_heads(results),
        models={name: m for kind in KINDS for name, m in results.of_kind(kind).items()},
        total_s=sum(results.timings_s.values()),
        configs=_configs(run_folder, results),
    )


def _task_heads(results: Results) -> dict[str, str]:
    """Each task with its number of prompts."""
    heads = {}
    for task in results.sft.tasks:
        counts = [model.tasks[task].n for model in results.models.values()]
        few, many = min(counts), max(counts)
        heads[task] = f"n = {few}" if few == many else f"n = {few} to {many}"
    return heads


def _configs(run_folder: Path, results: Results) -> list[_ConfigFile]:
    """The configs that the results name, without duplicates."""
    files = []
    for path in dict.fromkeys(model.config for model in results.models.values()):
        place = run_folder / path
        # A symbolic link may lead out of the folder; the page shows only files inside it.
        inside = place.resolve().is_relative_to(run_folder.resolve())
        text = place.read_text(errors="replace") if inside and place.is_file() else None
        models = tuple(name for name, model in results.models.items() if model.config == path)
        files.append(_ConfigFile(path, models, text))
    return files
