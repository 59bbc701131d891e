"""Results in the files of lm-evaluation-harness: `results_DATE.json`, `samples_TASK_DATE.jsonl`.

Programs that read the library's output read ours. Standard errors are by clusters, for means alone;
others are "N/A" (the library draws bootstraps). What the library does not know stands under
`poise`: the split, whether it is a half, prompts that were cut, the fingerprint.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from math import isnan
from pathlib import Path
from typing import Any

from operators.statistics import clustered_mean
from pipelines.commit import make_folder, write_atomically
from pipelines.evaluate.harness.evaluation import TaskResult
from pipelines.evaluate.harness.requests import Answer, Request
from pipelines.evaluate.harness.tasks import Score, Task
from pipelines.evaluate.harness.values import plain_config

NOT_KNOWN = "N/A"


def harness_results(results: Mapping[str, TaskResult], model: str, weights: str) -> dict[str, Any]:
    """The content of the library's results file, without samples.

    Args:
        model: its name.
        weights: the digest of its weights.
    """
    from lm_eval import __version__

    tasks = {name: result.task for name, result in sorted(results.items())}
    chat = next((task.chat for task in tasks.values()), None)
    return {
        "results": {name: _numbers(result) for name, result in results.items()},
        "group_subtasks": {},
        "configs": {name: task.config for name, task in tasks.items()},
        "versions": {name: task.library.VERSION for name, task in tasks.items()},
        "n-shot": {name: task.num_fewshot for name, task in tasks.items()},
        "higher_is_better": {
            name: {key.partition(",")[0]: each.higher_is_better for key, each in r.metrics.items()}
            for name, r in sorted(results.items())
        },
        "n-samples": {
            name: {"original": len(result.task.documents.all), "effective": len(result.task)}
            for name, result in results.items()
        },
        "config": {
            "model": "poise",
            "model_args": {"pretrained": model},
            "model_sha": weights,
            "limit": next((task.limit for task in tasks.values()), None),
            "fewshot_seed": next((task.seed for task in tasks.values()), None),
        },
        "lm_eval_version": __version__,
        "model_source": "poise",
        "model_name": model,
        "model_name_sanitized": _sanitized(model),
        "system_instruction": chat.system if chat else None,
        "fewshot_as_multiturn": bool(chat and chat.wanted and chat.multiturn),
        "task_hashes": {
            name: _hash(
                "".join(
                    line["doc_hash"] + line["prompt_hash"] + line["target_hash"]
                    for line in harness_samples(result)
                )
            )
            for name, result in results.items()
        },
        "poise": {
            "tasks": {
                name: {
                    "split": result.task.split,
                    "of": result.task.remark,
                    "prompts_cut": result.num_cut,
                    "fingerprint": result.task.fingerprint,
                }
                for name, result in results.items()
            },
        },
    }


def harness_samples(result: TaskResult) -> Iterator[dict[str, Any]]:
    """The lines of the library's file of samples: one for each filter and document."""
    task, library = result.task, result.task.library
    requests = _by_document(result.requests)
    answers = _by_document(result.answers)
    for score in result.scores:
        place = score.document
        document = dict(task.document(place))
        target = str(library.doc_to_target(document))
        asked = [list(each) for _, each in groupby(requests[place], key=lambda r: r.number)]
        drawn = [list(each) for _, each in groupby(answers[place], key=lambda a: a.number)]
        arguments = [_arguments(each[0], task) for each in asked]
        yield {
            "doc_id": task.ids[place],
            "doc": document,
            "target": target,
            "arguments": {
                f"gen_args_{i}": {f"arg_{j}": each for j, each in enumerate(values)}
                for i, values in enumerate(arguments)
            },
            "resps": [[_response(each, task) for each in draws] for draws in drawn],
            "filtered_resps": _texts(score.responses),
            "filter": score.filter,
            "metrics": list(score.metrics),
            "doc_hash": _hash(json.dumps(document, indent=2, default=str, ensure_ascii=False)),
            "prompt_hash": _hash(arguments[0][0]),
            "target_hash": _hash(target),
            **score.metrics,
        }


def write_harness_json(
    results: Mapping[str, TaskResult],
    folder: str | Path,
    model: str,
    weights: str,
    date: datetime | None = None,
) -> Path:
    """Write results and samples below `folder/MODEL/`, as the library does.

    Args:
        model: its name, which may be a path.
        weights: the digest of its weights.
        date: for the files' names; default now.

    Returns:
        the results file, which is written last.
    """
    stamp = (date or datetime.now()).isoformat().replace(":", "-")
    place = Path(folder) / _sanitized(model)
    make_folder(place)
    for name, result in results.items():
        lines = (
            json.dumps(line, default=str, ensure_ascii=False) + "\n"
            for line in harness_samples(result)
        )
        write_atomically(place / f"samples_{name.replace('/', '__')}_{stamp}.jsonl", "".join(lines))
    content = plain_config(harness_results(results, model, weights))
    target = place / f"results_{stamp}.json"
    write_atomically(target, json.dumps(content, indent=2, ensure_ascii=False))
    return target


def _numbers(result: TaskResult) -> dict[str, Any]:
    """A task's metrics with their standard errors, as in the library's table."""
    task = result.task
    found: dict[str, Any] = {
        "name": task.name,
        "alias": task.config.get("task_alias", task.name),
        "sample_len": max((each.n for each in result.metrics.values()), default=0),
    }
    for key, metric in result.metrics.items():
        name, _, filtered = key.partition(",")
        found[key] = metric.value
        error = _error(task, result.scores, name, filtered) if metric.is_mean else None
        found[f"{name}_stderr,{filtered}"] = NOT_KNOWN if error is None else error
    return found


def _error(task: Task, scores: Sequence[Score], metric: str, filtered: str) -> float | None:
    """The standard error of a mean, by clusters; None where there is only one."""
    own = [each for each in scores if each.filter == filtered and metric in each.metrics]
    values = [float(each.metrics[metric]) for each in own]
    _, error = clustered_mean(values, [task.clusters[each.document] for each in own])
    return None if isnan(error) else error


def _by_document(items: Sequence[Any]) -> dict[int, list[Any]]:
    """Requests or answers by their documents, in the order of numbers and draws."""
    found: dict[int, list[Any]] = {}
    for each in sorted(items, key=lambda item: (item.document, item.number, item.draw)):
        found.setdefault(each.document, []).append(each)
    return found


def _arguments(request: Request, task: Task) -> list[Any]:
    """What the library's request has as arguments."""
    if request.kind == "rolling":
        return [request.continuation]
    if request.kind == "generate":
        return [request.context, task.library.config.generation_kwargs]
    return [request.context, request.continuation]


def _response(answer: Answer, task: Task) -> Any:
    """An answer, its numbers as texts."""
    if answer.text is not None:
        return answer.text
    if task.output_type == "loglikelihood_rolling":
        return str(answer.value)
    return [str(answer.value), str(answer.is_greedy)]


def _texts(value: Any) -> Any:
    """All that is in lists, as texts."""
    return [_texts(each) for each in value] if isinstance(value, list) else str(value)


def _sanitized(model: str) -> str:
    """A model's name as the library makes a folder's name of it."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", model)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
