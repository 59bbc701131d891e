"""`results.json`: the results of a finished run, and its checks."""

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from pipelines.config import check
from pipelines.errors import InputError

RESULT_FILE = "results.json"
STRENGTHS = ("helpfulness", "honesty", "harmlessness")
COLUMNS = (*STRENGTHS, "average")
KINDS = ("base", "sft", "aligned", "merge")
# Results have full precision; the tolerance also accepts files rounded to one decimal.
AVERAGE_TOLERANCE = 0.1


def _inside(path: str) -> str:
    """Check that a path stays inside the run's folder, because the page shows the file's text."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError("expected a path relative to the run's folder, without '..'")
    return path


# No control characters and no markup: names are shown on the terminal, in plots and on the page.
Name = Annotated[str, StringConstraints(pattern=r"^[\w./+=@: -]+$")]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Length = Annotated[float, Field(ge=0, allow_inf_nan=False)]
InsidePath = Annotated[str, AfterValidator(_inside)]


class _Record(BaseModel):
    """Strict types; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Measurement(_Record):
    """A mean over prompts, or a mean of means, and its standard error, both in percent."""

    value: Percent
    stderr: Percent


class TaskMeasurement(Measurement):
    """A measurement of one task over `n` prompts."""

    n: int = Field(ge=1)


class ModelResults(_Record):
    """The results of one model."""

    helpfulness: Measurement
    honesty: Measurement
    harmlessness: Measurement
    average: Measurement
    tasks: dict[Name, TaskMeasurement]
    kind: Literal["base", "sft", "aligned", "merge"]
    parents: list[Name]
    config: InsidePath
    chosen: dict[Name, Any] = Field(description="parameters that a sweep chose on development")
    path: InsidePath
    delta_norm: Length | None = Field(
        None, description="norm of what training has added; unknown in older files"
    )
    update_norm: Length | None = Field(
        None, description="mean norm of an optimizer's update over the measured steps"
    )

    def measurement(self, column: str) -> Measurement:
        """The measurement of a column, one of `COLUMNS`."""
        return getattr(self, column)


class Results(_Record):
    """A whole `results.json`."""

    schema_number: Literal[1] = Field(alias="schema")
    seed: int
    split: Literal["test"]
    models: dict[Name, ModelResults] = Field(min_length=1)
    best_merge: Name = Field(description="the merge with the best average on development")
    paired_stderrs: dict[Name, dict[Name, dict[Name, Length]]] | None = Field(
        None,
        description="column -> model -> each later model: the standard error of their difference, "
        "paired by prompt; unknown in older files",
    )
    timings_s: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    versions: dict[str, str]

    @property
    def sft(self) -> ModelResults:
        """The SFT model; all others are compared with it."""
        return next(model for model in self.models.values() if model.kind == "sft")

    @property
    def sft_name(self) -> str:
        """The SFT model's name."""
        return next(name for name, model in self.models.items() if model.kind == "sft")

    def of_kind(self, kind: str) -> dict[str, ModelResults]:
        """The models of one of `KINDS`, in the file's order."""
        return {name: model for name, model in self.models.items() if model.kind == kind}


def load_results(run_folder: str | Path) -> Results:
    """Read and check the results of a finished run.

    Raises:
        InputError: no such folder, no `results.json` in it, or a file that is not JSON, has another
            schema number, lacks a field, or contradicts itself.
    """
    folder = Path(run_folder)
    path = folder / RESULT_FILE
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {found}; expected the folder of a finished run")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder}: holds no {RESULT_FILE}: no run, or an unfinished one"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    results = check(values, Results, str(path))
    problems = _contradictions(results)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{path}: {': '.join(problems[0])}{more}")
    return results


def _contradictions(results: Results) -> list[tuple[str, str]]:
    """Fields that contradict others, each with its problem."""
    problems = []
    num_sft = len(results.of_kind("sft"))
    if num_sft != 1:
        return [("models", f"found {num_sft} of kind 'sft', expected exactly one to compare with")]
    merges = list(results.of_kind("merge"))
    if results.best_merge not in merges:
        problems.append(("best_merge", f"found {results.best_merge!r}, allowed: {merges}"))
    tasks = set(results.sft.tasks)
    for name, model in results.models.items():
        field = f"models.{name}"
        for parent in model.parents:
            if parent not in results.models:
                problems.append((f"{field}.parents", f"found {parent!r}, which is no model here"))
        if set(model.tasks) != tasks:
            odd = sorted(set(model.tasks) ^ tasks)[0]
            problems.append((f"{field}.tasks", f"{odd!r} is measured for some models only"))
        mean = sum(model.measurement(strength).value for strength in STRENGTHS) / len(STRENGTHS)
        if abs(mean - model.average.value) > AVERAGE_TOLERANCE:
            found = f"found {model.average.value:.2f}, but the mean of the three is {mean:.2f}"
            problems.append((f"{field}.average.value", found))
    return problems
