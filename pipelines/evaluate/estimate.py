"""What a planned evaluation will take, before an engine starts: tokens, and a time from below."""

import time
from dataclasses import dataclass

import torch

from pipelines.engines.models import context_of
from pipelines.engines.text import Text
from pipelines.engines.weights import Weights
from pipelines.evaluate.interface import EvaluationTask
from pipelines.evaluate.plan import EvaluationPlan
from pipelines.evaluate.store import Store

LOOKED_AT = 32  # documents of a task whose tokens are counted
_MATRIX = 1024  # rows and columns of the product that is timed


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of a task, for all models of a plan.

    Attributes:
        documents: of the task.
        blocks: of all models.
        missing: the blocks that are not in the store.
        tokens: read and at most written in the missing blocks, about.
        flops: of the missing blocks, about: two for each parameter and token.
    """

    task: str
    documents: int
    blocks: int
    missing: int
    tokens: int
    flops: float


def estimates(plan: EvaluationPlan) -> list[Estimate]:
    """The estimate of each task. Prompts are cut into tokens as by the first model."""
    first = next(iter(plan.headers.values()))
    text = Text(first, context_of(first.config, plan.config.engine))
    parameters = {name: _num_parameters(each) for name, each in plan.headers.items()}
    missing = _missing(plan)
    found = []
    for task in plan.tasks:
        per_document = _tokens_of_a_document(task, text)
        documents = {name: missing[name, task.name][1] for name in plan.models}
        found.append(
            Estimate(
                task=task.name,
                documents=task.num_documents,
                blocks=sum(plan.cells[name, task.name].num_blocks for name in plan.models),
                missing=sum(missing[name, task.name][0] for name in plan.models),
                tokens=round(per_document * sum(documents.values())),
                flops=sum(2 * parameters[n] * per_document * documents[n] for n in plan.models),
            )
        )
    return found


def _num_parameters(weights: Weights) -> int:
    """The elements of a model's tensors."""
    return sum(torch.Size(shape).numel() for _, shape in weights.tensors.values())


def measured_flops() -> float:
    """Floating point operations a second of this process's device in a large product of matrices,
    in float32 on a CPU and bf16 on a GPU: more than a model reaches.
    """
    has_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    matrix = torch.ones(_MATRIX, _MATRIX, device=device, dtype=dtype)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the GPU
        times.append(time.perf_counter() - start)
    return 2 * _MATRIX**3 / min(times)


def _missing(plan: EvaluationPlan) -> dict[tuple[str, str], tuple[int, int]]:
    """The missing blocks of each cell, and their documents; nothing is written."""
    found, store = {}, Store(plan.out)
    for place, cell in plan.cells.items():
        blocks = store.missing(cell)
        ranges = [cell.documents(block) for block in blocks]
        found[place] = (len(blocks), sum(last - first for first, last in ranges))
    return found


def _tokens_of_a_document(task: EvaluationTask, text: Text) -> float:
    """The mean number of tokens that are read and at most written for a document."""
    last = min(LOOKED_AT, task.num_documents)
    return task.num_tokens(text, 0, last) / last
