"""Pairs from a model's own answers, by what checkers and rules said of them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from pipelines.commit import staged_directory
from pipelines.errors import InputError
from pipelines.evaluate.interface import Sample
from pipelines.evaluate.results import Evaluation
from pipelines.real_model.config import RealConfig
from pipelines.real_model.data import (
    OWN_HARMFUL,
    Fields,
    own_answers,
    read_rows,
    shuffled,
    write_pairs,
)

Pair = tuple[str, str, str]


def write_own_pairs(config: RealConfig, answers: Path, data: Path, model: str, out: Path) -> None:
    """Write `out/helpful.jsonl` and `out/harmless.jsonl`; the latter are those of `data`, if any.

    Args:
        answers: a finished evaluation of `model` on the tasks in `data/samples`.

    Raises:
        InputError: no prompt has an accepted answer and one that is not; or `out` exists.
    """
    evaluation = Evaluation(answers)
    rows = read_rows(data / "samples" / f"{own_answers(0)}.jsonl")
    draws = [
        evaluation.samples(model, own_answers(draw)) for draw in range(config.training.answers)
    ]
    pairs = {"helpful": checked_pairs(rows, draws, "instructions")}
    given = data / "harmless.jsonl"
    if not given.is_file():
        rows = read_rows(data / "samples" / f"{OWN_HARMFUL}.jsonl")
        pairs["harmless"] = refused_pairs(rows, evaluation.samples(model, OWN_HARMFUL), "contains")
    for name, each in pairs.items():
        if not each:
            raise InputError(
                f"real: no {name} pair came out of the model's own answers; allowed: more "
                "training.prompts or training.answers"
            )
    with staged_directory(out) as folder:
        if given.is_file():
            shutil.copyfile(given, folder / given.name)
        for name, each in pairs.items():
            most = shuffled(each, config.seed, name)[: config.training.pairs]
            write_pairs(folder / f"{name}.jsonl", most)


def checked_pairs(
    rows: Sequence[Fields], draws: Sequence[Sequence[Sample]], metric: str
) -> list[Pair]:
    """Of each prompt the accepted answers against the others, each answer in one pair at most, in
    the order in which they were drawn.

    Args:
        rows: with a `prompt` each.
        draws: a sample of each row, several times.
    """
    found = []
    for row, *samples in zip(rows, *draws, strict=True):
        sides: dict[bool, dict[str, None]] = {True: {}, False: {}}  # ordered, each text once
        for sample in samples:
            if text := _text(sample):
                sides[sample.values[metric] == 1][text] = None
        found += [(row["prompt"], *pair) for pair in zip(sides[True], sides[False], strict=False)]
    return found


def refused_pairs(rows: Sequence[Fields], samples: Sequence[Sample], metric: str) -> list[Pair]:
    """Of each request that an answer goes along with: a refusal against it.

    Args:
        rows: `prompt` and a refusal, `chosen`, one for each sample.
    """
    return [
        (row["prompt"], row["chosen"], _text(sample))
        for row, sample in zip(rows, samples, strict=True)
        if sample.values[metric] == 0 and _text(sample)
    ]


def _text(sample: Sample) -> str:
    """The answer to its only request."""
    return str(sample.answers[0]["text"]).strip()
