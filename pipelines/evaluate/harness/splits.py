"""Which documents of a task are for development, and which for the test.

A task's validation split is for development, its test split for the test. A task that has one of
them alone (or the same as both) is halved: its clusters are put in an order by a seeded hash, the
first half of them is for development, the others are for the test.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipelines.errors import InputError

if TYPE_CHECKING:
    from lm_eval.api.task import Task as LibraryTask

Split = Literal["development", "test"]
SPLITS: tuple[Split, ...] = ("development", "test")


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of one split, in the order of the task's data.

    Attributes:
        all: the documents of the task's own split; `chosen` are places in it.
        chosen: the documents that count, ascending: the library's `doc_id`s.
        clusters: of each chosen document; documents of one are not independent.
        source: the name of the task's own split, or "" where the task does not say.
        is_halved: whether the documents are a half of that split.
    """

    all: Sequence[Mapping[str, Any]]
    chosen: tuple[int, ...]
    clusters: tuple[str, ...]
    source: str
    is_halved: bool


def documents_of(task: "LibraryTask", split: Split, seed: int) -> Documents:
    """The documents of a split; the library's task is changed so that its few-shot examples leave
    out the document in question, as they do for its own split.

    Raises:
        InputError: the task has neither split, or cannot be halved.
    """
    name = task.task_name
    names = {
        "development": task.config.validation_split if task.has_validation_docs() else None,
        "test": task.config.test_split if task.has_test_docs() else None,
    }
    if not (task.has_validation_docs() or task.has_test_docs()):
        raise InputError(f"task {name}: has neither a validation split nor a test split")
    has_both = task.has_validation_docs() and task.has_test_docs()
    has_both = has_both and (names["development"] is None or names["development"] != names["test"])
    if split == "development" and has_both:
        _evaluate_on_validation(task)
    docs = task.eval_docs
    found = docs if hasattr(docs, "__getitem__") else list(docs)
    clusters = [cluster_of(task, document) for document in found]
    chosen = range(len(clusters)) if has_both else half(name, clusters, split, seed)
    source = names[split] if has_both else names["test"] or names["development"]
    return Documents(
        found, tuple(chosen), tuple(clusters[place] for place in chosen), source or "", not has_both
    )


def half(task: str, clusters: Sequence[str], split: Split, seed: int) -> list[int]:
    """The places of the documents of one half, ascending.

    Args:
        task: its name, for messages; two tasks with the same clusters are halved alike.
        clusters: of all documents.

    Raises:
        InputError: there are fewer than two clusters.
    """
    ordered = sorted(set(clusters), key=lambda cluster: (_hash(f"{seed}|{cluster}"), cluster))
    if len(ordered) < 2:
        raise InputError(
            f"task {task}: has one split, to be halved, with {len(ordered)} clusters of documents; "
            "allowed: two or more"
        )
    development = set(ordered[: len(ordered) // 2])
    wanted = split == "development"
    return [place for place, each in enumerate(clusters) if (each in development) == wanted]


def cluster_of(task: "LibraryTask", document: Mapping[str, Any]) -> str:
    """The cluster of a document: `metadata.cluster` in the task's YAML, a column or a template;
    else a digest of the document.

    Raises:
        InputError: the column is not there, or the template cannot be filled in.
    """
    metadata = task.config.metadata
    rule = metadata.get("cluster") if isinstance(metadata, dict) else None
    if rule is None:
        return digest(document)
    if isinstance(rule, str) and rule in document:
        return str(document[rule])
    if not isinstance(rule, str) or "{" not in rule:
        raise InputError(
            f"task {task.task_name}: metadata.cluster: found {rule!r}; allowed: a template, or one "
            f"of {', '.join(document)}"
        )
    from jinja2 import TemplateError
    from lm_eval.utils import apply_template

    try:
        return str(apply_template(rule, document))
    except TemplateError as error:
        raise InputError(f"task {task.task_name}: metadata.cluster: {error}") from None


def digest(document: Any) -> str:
    """32 hex digits of a document."""
    text = json.dumps(document, sort_keys=True, default=str, ensure_ascii=False)
    return _hash(text)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _evaluate_on_validation(task: "LibraryTask") -> None:
    """Let the library's task count its validation split as the one that is evaluated."""
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask):
        task.has_test_docs = lambda: False
        return
    validation = task.config.validation_split
    examples = task.fewshot_cfg
    if examples.split is None and examples.samples is None and not task.has_training_docs():
        examples.split = validation  # the rule without a name; named, it leaves the document out
    task.config.test_split = validation
    task.task_docs = task.eval_docs
    task.features = list(task.task_docs.features)
