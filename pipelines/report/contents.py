"""The pages of a finished demo and of a set of evaluations: what is put on them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import InputError
from pipelines.evaluate.results import Evaluation
from pipelines.report.evaluations import make_matrix
from pipelines.report.findings import findings
from pipelines.report.joined import Set, described, join
from pipelines.report.lineage import Origin, origins
from pipelines.report.matrix import Matrix, matrix_of_results
from pipelines.report.page import Page
from pipelines.report.results import COLUMNS, Results
from pipelines.report.samples import chosen_samples
from pipelines.report.table import table_rows

EVALUATION = Path("results", "evaluation-test")  # of a demo, in its folder
_CHOSEN = "the merge that is best on development"
_TOLERANCE = 1e-6  # of percent; both files hold full precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a page is made.

    Attributes:
        samples: the most documents of a task that it holds.
        seed: of the bootstrap, and of the choice among samples on which models differ alike.
        lower: columns, tasks or metrics of which less is better.
        axes: names of the two columns that the trade-off shows at first.
    """

    samples: int = 50
    seed: int = 0
    lower: tuple[str, ...] = ()
    axes: tuple[str, str] | None = None


def page_of_evaluations(evaluations: Sequence[Evaluation], settings: Settings) -> Page:
    """The page of a set of evaluations.

    Raises:
        InputError: evaluations that do not go together, samples that are damaged or gone, or
            settings that name what is not there.
    """
    found = join(evaluations)
    if not found.rows or not any(found.metrics(frame) for frame in found.frames):
        raise InputError(f"{evaluations[0].place.address}: holds no numbers")
    matrix = make_matrix(found, lower=settings.lower, seed=settings.seed)
    lineage = origins(_paths(found))
    kinds = {origin.name: origin.kind for origin in lineage}
    names = ", ".join(each.name for each in evaluations)
    frames = "; ".join(f"{frame} split" for frame in dict.fromkeys(found.frames))
    about = f"{len(matrix.rows)} models, {len(matrix.columns)} columns; {frames}"
    return Page(
        title=f"Evaluation: {names}" if len(evaluations) == 1 else f"Evaluations: {names}",
        about=f"{about}; ± standard error by cluster of documents",
        matrix=matrix,
        kinds=[kinds[row] for row in matrix.rows],
        axes=_axes(matrix, settings),
        samples=chosen_samples(found, settings.samples, settings.seed),
        origins=lineage,
        runs=described(found),
    )


def _axes(matrix: Matrix, settings: Settings) -> tuple[int, int]:
    """The columns that a trade-off shows at first: two groups made of tasks, else two tasks."""
    if settings.axes is not None:
        x, y = (matrix.index(name, "--axes") for name in settings.axes)
        return x, y
    columns = list(enumerate(matrix.columns))
    groups = [c for c, each in columns if each.kind == "group" and each.inner]
    tasks = [c for c, each in columns if each.kind == "task"]
    first = next((each for each in (groups, tasks) if len(each) >= 2), [c for c, _ in columns])
    return first[0], first[min(1, len(first) - 1)]


def _paths(found: Set) -> dict[str, tuple[str, str]]:
    """Each row's path or name on the hub, and its digest."""
    paths: dict[str, tuple[str, str]] = {}
    for each in found.evaluations:
        for name, entry in each.summary["models"].items():
            row = found.rows[name, entry["digest"]]
            paths.setdefault(row, (str(each.summary["config"]["models"][name]), entry["digest"]))
    return paths


def page_of_demo(folder: Path, results: Results, settings: Settings) -> Page:
    """The page of a finished demo. With its evaluation at hand differences are paired by document
    and samples are there; else the numbers of `results.json` are all.

    Raises:
        InputError: the evaluation contradicts `results.json`, or settings that name what is not
            there.
    """
    matrix, samples, runs, root = matrix_of_results(results), None, [], ""
    digests = dict.fromkeys(matrix.rows, "")
    if (folder / EVALUATION / "evaluation.json").is_file():
        evaluation = Evaluation(folder / EVALUATION)
        found = join([evaluation])
        full = make_matrix(found, lower=settings.lower, seed=settings.seed)
        matrix = _in_order(full, matrix, folder)
        samples = _reordered(chosen_samples(found, settings.samples, settings.seed), full, matrix)
        runs = described(found)
        digests = {name: each["digest"] for name, each in evaluation.summary["models"].items()}
        root = _root(evaluation, results)
    lineage = origins(
        {name: (results.models[name].path, digests[name]) for name in matrix.rows},
        folder,
        [each for each in (root, f"{folder.resolve()}/") if each],
    )
    poise = results.versions.get("poise", "")
    paired = bool(np.isfinite(matrix.pairs).any())
    return Page(
        title="Helpfulness, honesty, harmlessness",
        about=f"Poise {poise}; seed {results.seed}; {results.split} split, percent ± standard "
        "error. Every choice was made on the development split.",
        matrix=matrix,
        kinds=[results.models[name].kind for name in matrix.rows],
        notes={row.name: row.notes for row in table_rows(results)},
        marked=(results.best_merge, _CHOSEN),
        reference=matrix.rows.index(results.sft_name),
        axes=_axes(matrix, replace(settings, axes=settings.axes or (COLUMNS[0], COLUMNS[2]))),
        findings=[sentence.split(": ", 1) for sentence in findings(results)],
        findings_note=_errors_in_words(results, paired)
        + " A standard error of 0 (every prompt right, or none) understates the uncertainty.",
        samples=samples,
        origins=_with_parents(lineage, results),
        runs=runs,
        configs=_configs(folder, results),
        timings_s=results.timings_s,
        versions=results.versions,
    )


def _errors_in_words(results: Results, paired: bool) -> str:
    """What the errors of the findings are.

    Args:
        paired: whether the page's table has paired ones.
    """
    if results.paired_stderrs is not None:
        return "Errors of differences are paired by prompt, as all models answer the same."
    below = ": the table below has them, paired by prompt." if paired else "."
    return (
        "Errors in these sentences are those of independent measurements. Models answer the same "
        f"prompts, so the true errors of differences are mostly smaller{below}"
    )


def _in_order(full: Matrix, shown: Matrix, folder: Path) -> Matrix:
    """An evaluation's matrix with the rows and columns of `results.json`, whose numbers it must
    have.
    """
    place = folder / EVALUATION
    if set(shown.rows) - set(full.rows):
        raise InputError(f"{place}: lacks models of results.json; run the demo again")
    rows = [full.rows.index(name) for name in shown.rows]
    columns = [full.index(column.name, f"{place}: columns") for column in shown.columns]
    measured = full.values[np.ix_(rows, columns)]
    if not np.allclose(measured, shown.values, rtol=0, atol=_TOLERANCE):
        raise InputError(f"{place}: has other numbers than results.json; run the demo again")
    return Matrix(
        rows=shown.rows,
        columns=tuple(full.columns[c] for c in columns),
        values=shown.values,
        stderrs=shown.stderrs,
        pairs=full.pairs[np.ix_(columns, rows, rows)],
        support=full.support[np.ix_(columns, columns, rows)],
        num_draws=full.num_draws,
    )


def _reordered(samples: dict[str, Any], full: Matrix, shown: Matrix) -> dict[str, Any]:
    """Samples whose answers stand in the order of the shown rows."""
    places = [full.rows.index(row) for row in shown.rows]
    for task in samples["tasks"]:
        for document in task["documents"]:
            document["answers"] = [document["answers"][place] for place in places]
    return samples


def _root(evaluation: Evaluation, results: Results) -> str:
    """The beginning that the run's paths had when it was measured: runs may be moved."""
    for name, path in evaluation.summary["config"]["models"].items():
        if name in results.models and str(path).endswith(f"/{results.models[name].path}"):
            return str(path).removesuffix(results.models[name].path)
    return ""


def _with_parents(lineage: list[Origin], results: Results) -> list[Origin]:
    """Origins with what `results.json` says of parents and kinds."""
    for origin in lineage:
        if origin.name in results.models:
            model = results.models[origin.name]
            origin.parents = origin.parents or list(model.parents)
            origin.kind = model.kind
    return lineage


def _configs(folder: Path, results: Results) -> list[dict[str, Any]]:
    """The configs that the results name, without duplicates, with the models made with them."""
    files = []
    for path in dict.fromkeys(model.config for model in results.models.values()):
        place = folder / path
        # A symbolic link may lead out of the folder; the page shows only files inside it.
        inside = place.resolve().is_relative_to(folder.resolve())
        text = place.read_text(errors="replace") if inside and place.is_file() else None
        models = [name for name, model in results.models.items() if model.config == path]
        files.append({"path": path, "models": models, "text": text})
    return files
