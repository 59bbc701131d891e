"""What a planned evaluation will take, before an engine starts: tokens, and a time from below."""

import time
from dataclasses import dataclass

import torch

from pipelines.engines.models import context_of
from pipelines.engines.text import Text
from pipelines.engines.weights import Weights
from pipelines.evaluate.interface import EvaluationTask
from pipelines.evaluate.plan import EvaluationPlan
from pipelines.evaluate.scoring import ScoredTask
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
        calls: at most, of a scorer for the missing blocks.
        tokens: read and at most written in the missing blocks, about.
        flops: of the missing blocks, about: two for each parameter and token.
    """

    task: str
    documents: int
    blocks: int
    missing: int
    tokens: int
    flops: float
    calls: int = 0


def estimates(plan: EvaluationPlan) -> list[Estimate]:
    """The estimate of each task. Prompts are cut into tokens as by the first model."""
    first = next(iter(plan.headers.values()))
    text = Text(first, context_of(first.config, plan.config.engine))
    parameters = {name: _num_parameters(each) for name, each in plan.headers.items()}
    missing = _missing(plan)
    found = []
    for task in plan.tasks:
        per_document = _tokens_of_a_document(task, text)
        documents = {name: missing[name, task.name].unanswered for name in plan.models}
        unfinished = sum(missing[name, task.name].documents for name in plan.models)
        found.append(
            Estimate(
                task=task.name,
                documents=task.num_documents,
                blocks=sum(plan.cells[name, task.name].num_blocks for name in plan.models),
                missing=sum(missing[name, task.name].blocks for name in plan.models),
                tokens=round(per_document * sum(documents.values())),
                flops=sum(2 * parameters[n] * per_document * documents[n] for n in plan.models),
                calls=task.scorer.num_calls(unfinished) if isinstance(task, ScoredTask) else 0,
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


@dataclass(frozen=True, slots=True)
class _Missing:
    """What a cell lacks: blocks, their documents, and those of them that have no answers yet."""

    blocks: int
    documents: int
    unanswered: int


def _missing(plan: EvaluationPlan) -> dict[tuple[str, str], _Missing]:
    """What each cell lacks; nothing is written."""
    found, store = {}, Store(plan.out)
    for place, cell in plan.cells.items():
        ranges = {block: cell.documents(block) for block in store.missing(cell)}
        sizes = {block: last - first for block, (first, last) in ranges.items()}
        unanswered = sizes.keys() & store.missing(plan.answers.get(place, cell))
        of_these = sum(sizes[block] for block in unanswered)
        found[place] = _Missing(len(sizes), sum(sizes.values()), of_these)
    return found


def _tokens_of_a_document(task: EvaluationTask, text: Text) -> float:
    """The mean number of tokens that are read and at most written for a document."""
    last = min(LOOKED_AT, task.num_documents)
    return task.num_tokens(text, 0, last) / last
