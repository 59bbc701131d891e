"""The report's files: all are made in memory before any is written, so bad input writes nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.commit import write_atomically
from pipelines.errors import InputError
from pipelines.evaluate.results import Evaluation
from pipelines.report.contents import Settings, page_of_demo, page_of_evaluations
from pipelines.report.figures import plot_heat, plot_scatter
from pipelines.report.page import render_page
from pipelines.report.plots import Pictures, plot_matrix, plot_tradeoff
from pipelines.report.results import Results

MATRIX, TRADEOFF, PAGE_FILE = "matrix", "tradeoff", "report.html"


def make_report(
    run_folder: Path, results: Results, settings: Settings | None = None
) -> dict[str, bytes]:
    """The content of `report.html`, and of `matrix` and `tradeoff` as PNG and SVG; equal results
    give equal bytes.
    """
    page = render_page(page_of_demo(run_folder, results, settings or Settings()))
    return {PAGE_FILE: page.encode()} | _files(plot_matrix(results), plot_tradeoff(results))


def make_report_of_evaluations(
    evaluations: Sequence[Evaluation], settings: Settings, *, pictures: bool = True
) -> dict[str, bytes]:
    """As `make_report`, for a set of evaluations.

    Args:
        pictures: else the page alone.
    """
    page = page_of_evaluations(evaluations, settings)
    files = {PAGE_FILE: render_page(page).encode()}
    if pictures:
        scatter = plot_scatter(page.matrix, page.kinds, *page.axes)
        files |= _files(plot_heat(page.matrix), scatter)
    return files


def _files(matrix: Pictures, tradeoff: Pictures) -> dict[str, bytes]:
    return {
        f"{name}.{form}": content
        for name, forms in ((MATRIX, matrix), (TRADEOFF, tradeoff))
        for form, content in forms.items()
    }


def _is_page(out: Path) -> bool:
    """Whether an `out` names a page, not a folder."""
    return out.suffix == ".html"


def write_reports(
    runs: Sequence[tuple[Path, Results]],
    out: Path | None,
    *,
    force: bool = False,
    settings: Settings | None = None,
) -> list[Path]:
    """Write the report of each run; existing files with the same bytes are not touched.

    Args:
        runs: folder and results of each run.
        out: the folder for the files; several runs get subfolders with the runs' names. A name
            that ends in `.html`: the page of one run alone. None: the files go into each run's
            own folder and replace older reports there.
        force: write into an `out` that holds other files; they stay, reports are replaced.

    Returns:
        the pages, one for each run.

    Raises:
        InputError: a run is given twice, two runs have the same name; `out` is a file, or holds
            other files and `force` is false.
    """
    settings = settings or Settings()
    if out is not None and _is_page(out):
        if len(runs) > 1:
            raise InputError(
                f"--out: found the page {out} for {len(runs)} runs of `poise demo`; allowed: a "
                "folder, which gets a page of each run"
            )
        page = render_page(page_of_demo(*runs[0], settings))
        return _write_page(out, page.encode(), force=force)
    places = report_places([folder for folder, _ in runs], out)
    files = {
        places[folder] / name: content
        for folder, results in runs
        for name, content in make_report(folder, results, settings).items()
    }
    _write(files, out, force=force)
    return [place / PAGE_FILE for place in places.values()]


def write_report_of_evaluations(
    folders: Sequence[Path], out: Path | None, *, force: bool = False, settings: Settings
) -> list[Path]:
    """Write the one report of a set of evaluations.

    Args:
        out: as in `write_reports`; None: into the folder of the one evaluation.

    Returns:
        its page.

    Raises:
        InputError: as `write_reports`, or `out` is missing for several evaluations.
    """
    _check_each_once(folders)
    if out is None and len(folders) > 1:
        raise InputError(
            f"--out: required for {len(folders)} evaluations; give a folder, or page.html"
        )
    evaluations = [Evaluation(folder) for folder in folders]
    if out is not None and _is_page(out):
        files = make_report_of_evaluations(evaluations, settings, pictures=False)
        return _write_page(out, files[PAGE_FILE], force=force)
    place = folders[0] if out is None else out
    made = make_report_of_evaluations(evaluations, settings)
    _write({place / name: content for name, content in made.items()}, out, force=force)
    return [place / PAGE_FILE]


def _write_page(out: Path, content: bytes, *, force: bool) -> list[Path]:
    if out.is_dir():
        raise InputError(f"{out}: is a folder; --out that ends in .html is a page")
    if out.exists() and not force and out.read_bytes() != content:
        raise InputError(f"{out}: exists and differs; choose another --out, or --force")
    _write({out: content}, None, force=force)
    return [out]


def _write(files: Mapping[Path, bytes], out: Path | None, *, force: bool) -> None:
    if out is not None:
        _refuse_other_content(out, files, force=force)
    for path, content in files.items():
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)


def report_places(folders: Sequence[Path], out: Path | None) -> dict[Path, Path]:
    """The folder for the report of each run.

    Raises:
        InputError: a run is given twice, or two runs would share a folder below `out`.
    """
    _check_each_once(folders)
    places: dict[Path, Path] = {}
    for folder in folders:
        below = Path() if len(folders) == 1 else Path(folder.resolve().name)
        places[folder] = folder if out is None else out / below
    if len(set(places.values())) < len(folders):
        raise InputError(f"{out}: two of the runs have the same name; report them one by one")
    return places


def _check_each_once(folders: Sequence[Path]) -> None:
    """Raise InputError for a run that is given twice."""
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise InputError(f"{folder}: given twice; each run once")
        seen.add(folder.resolve())


def _refuse_other_content(out: Path, files: Mapping[Path, bytes], *, force: bool) -> None:
    """Raise InputError if `out` holds anything but these files with these bytes."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; --out is a folder, or a page's name with .html")
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
