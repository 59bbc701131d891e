"""The report's files: all are made in memory before any is written, so bad input writes nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.commit import write_atomically
from pipelines.errors import InputError
from pipelines.report.page import render_page
from pipelines.report.plots import plot_matrix, plot_tradeoff
from pipelines.report.results import Results

MATRIX_FILE, TRADEOFF_FILE, PAGE_FILE = "matrix.png", "tradeoff.png", "report.html"


def make_report(run_folder: Path, results: Results) -> dict[str, bytes]:
    """The content of `matrix.png`, `tradeoff.png` and `report.html`; equal results give equal
    bytes.
    """
    matrix, tradeoff = plot_matrix(results), plot_tradeoff(results)
    plots = {"Models and tasks": matrix, "Trade-offs between strengths": tradeoff}
    page = render_page(run_folder, results, plots)
    return {MATRIX_FILE: matrix, TRADEOFF_FILE: tradeoff, PAGE_FILE: page.encode()}


def write_reports(
    runs: Sequence[tuple[Path, Results]], out: Path | None, *, force: bool = False
) -> list[Path]:
    """Write the report of each run; existing files with the same bytes are not touched.

    Args:
        runs: folder and results of each run.
        out: the folder for the files; several runs get subfolders with the runs' names. None: the
            files go into each run's own folder and replace older reports there.
        force: write into an `out` that holds other files; they stay, reports are replaced.

    Returns:
        the pages, one for each run.

    Raises:
        InputError: a run is given twice, two runs have the same name; `out` is a file, or holds
            other files and `force` is false.
    """
    places = report_places([folder for folder, _ in runs], out)
    files = {
        places[folder] / name: content
        for folder, results in runs
        for name, content in make_report(folder, results).items()
    }
    if out is not None:
        _refuse_other_content(out, files, force=force)
    for path, content in files.items():
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)
    return [place / PAGE_FILE for place in places.values()]


def report_places(folders: Sequence[Path], out: Path | None) -> dict[Path, Path]:
    """The folder for the report of each run.

    Raises:
        InputError: a run is given twice, or two runs would share a folder below `out`.
    """
    seen: set[Path] = set()
    places: dict[Path, Path] = {}
    for folder in folders:
        absolute = folder.resolve()
        if absolute in seen:
            raise InputError(f"{folder}: given twice; each run once")
        seen.add(absolute)
        below = Path() if len(folders) == 1 else Path(absolute.name)
        places[folder] = folder if out is None else out / below
    if len(set(places.values())) < len(folders):
        raise InputError(f"{out}: two of the runs have the same name; report them one by one")
    return places


def _refuse_other_content(out: Path, files: Mapping[Path, bytes], *, force: bool) -> None:
    """Raise InputError if `out` holds anything but these files with these bytes."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; --out is a folder")
    if force or not out.is_dir():
        return
    for path in out.rglob("*"):
        # A killed run may have left unfinished files of ours.
        if path.is_dir() or path.name.endswith(".partial"):
            continue
        if path not in files or path.read_bytes() != files[path]:
            raise InputError(
                f"{out}: exists and holds {str(path.relative_to(out))!r}; choose another --out, "
                "or --force to write into it"
            )
