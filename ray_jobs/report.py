"""`poise report`: table, findings, plots and page of finished runs; a page of evaluations."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import InputError
from pipelines.evaluate.store import RESULT_FILE
from pipelines.report import (
    LEGEND,
    LEGEND_OVER_RUNS,
    PLAIN_WIDTH,
    Results,
    Settings,
    findings,
    findings_over_runs,
    load_results,
    render_table,
    table_rows,
    table_rows_over_runs,
    write_report_of_evaluations,
    write_reports,
)
from pipelines.storage import is_address, resolve_output


def run_report(
    paths: list[Path], out: Path | None, *, force: bool, settings: Settings | None = None
) -> None:
    """Of runs of `poise demo`, print the table and findings of each, and of the means over several,
    and write the files of each. Of evaluations, write one page.

    Raises:
        InputError: a run that is unfinished or cannot be read, runs with different models, an
            `out` with other files, or runs beside evaluations; then nothing has been written.
    """
    for path in paths:
        if is_address(path):
            raise InputError(
                f"{path}: is an address; allowed: folders (poise results reads others)"
            )
    target = None if out is None else resolve_output(out, None)
    settings = settings or Settings()
    evaluations = [path for path in paths if (path / RESULT_FILE).is_file()]
    if evaluations and len(evaluations) < len(paths):
        raise InputError(
            f"{evaluations[0]}: is an evaluation, and others are not; report them apart "
            "(the evaluation of a demo lies in results/evaluation-test)"
        )
    if evaluations:
        pages = write_report_of_evaluations(paths, target, force=force, settings=settings)
    else:
        runs = [(path, load_results(path)) for path in paths]
        texts = [_text_of_run(path, results, len(paths) > 1) for path, results in runs]
        if len(runs) > 1:
            texts.append(_text_over_runs([results for _, results in runs]))
        pages = write_reports(runs, target, force=force, settings=settings)
        _print("\n\n".join(texts))
    for page in pages:
        print(f"report: {page}", file=sys.stderr)


def _text_of_run(path: Path, results: Results, several: bool) -> str:
    """Table and findings of one run, with the run's name if there are several."""
    width, colour = _terminal()
    start = f"{path.resolve().name}, " if several else ""
    return _text(
        render_table(
            table_rows(results),
            title=f"{start}seed {results.seed}, {results.split} split, percent ±standard error",
            legend=LEGEND.format(sft=results.sft_name),
            width=width,
            colour=colour,
        ),
        findings(results),
    )


def _text_over_runs(runs: Sequence[Results]) -> str:
    """Table of means and findings over several runs."""
    width, colour = _terminal()
    seeds = ", ".join(str(results.seed) for results in runs)
    return _text(
        render_table(
            table_rows_over_runs(runs),
            title=f"Means over {len(runs)} runs (seeds {seeds}), test split, percent",
            legend=LEGEND_OVER_RUNS.format(sft=runs[0].sft_name),
            width=width,
            colour=colour,
        ),
        findings_over_runs(runs),
    )


def _text(table: str, sentences: list[str]) -> str:
    """A table with its findings below."""
    return table + "\n" + "".join(f"- {sentence}\n" for sentence in sentences)


def _terminal() -> tuple[int, bool]:
    """Width and colour for `render_table`: the terminal's, or plain if stdout is not a terminal."""
    if not sys.stdout.isatty():
        return PLAIN_WIDTH, False
    return shutil.get_terminal_size().columns, "NO_COLOR" not in os.environ


def _print(text: str) -> None:
    """Write to stdout; characters that its encoding lacks become '?' instead of an error."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
