"""Instructions that a program can check ("in at least 300 words"), as IFEval and IFBench give
them: the checkers are those of the package `if-verifiable`.
"""

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

from pydantic import Field

from pipelines.config import Config, check
from pipelines.errors import InputError


class Checkers(Config):
    """Whose checkers are asked."""

    benchmark: Literal["ifbench", "ifeval"] = "ifbench"


class InstructionRow(Config):
    """What a data set says of one prompt; further fields are not read."""

    model_config = Config.model_config | {"extra": "ignore"}
    prompt: str
    instruction_id_list: list[str] = Field(min_length=1)
    kwargs: list[dict[str, Any]] = Field(description="of each instruction's checker")


def instructions(completion: str, answers: Sequence[str], parameters: Mapping[str, Any]) -> bool:
    """The completion follows all instructions of the row, which is the answer, as JSON: IFBench's
    `loose` accuracy of prompts (Pyatkin et al. 2025), which forgives a first or last line and marks
    of emphasis. An answer on which a checker itself breaks does not follow it.

    Raises:
        InputError: the answer is no such row, an unknown instruction, or a checker whose data of
            NLTK are not on this machine.
    """
    from if_verifiable.common import evaluate_instructions

    try:
        values = json.loads(answers[0])
    except ValueError:
        raise InputError("instructions: the answer is not JSON; expected the data's row") from None
    row = check(values, InstructionRow, "instructions: the answer")
    name = Checkers(**parameters).benchmark
    known = import_module(f"if_verifiable.{name}.instructions_registry").INSTRUCTION_DICT
    for each in row.instruction_id_list:
        if each not in known:
            raise InputError(f"instructions: unknown instruction {each!r} of {name}")
    try:
        _, scores = evaluate_instructions(
            completion, row.instruction_id_list, row.kwargs, row.prompt, known
        )
    except Exception as error:
        if type(error) is LookupError:  # NLTK's own; an index or key that fails is the answer's
            told = ", ".join(row.instruction_id_list)
            raise InputError(
                f"instructions: the checkers of {told} need NLTK's data, which are not here: "
                "python -m nltk.downloader punkt punkt_tab stopwords averaged_perceptron_tagger_eng"
            ) from None
        return False
    return bool(scores.binary_loose == 1)
