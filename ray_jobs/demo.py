"""`poise demo`: the whole workflow on the tiny world, as the pipeline configs/demo/pipeline.yaml.

Its configs, with the run's folder, seed and size, are below `OUT/configs/`.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pipelines.commit import write_atomically
from pipelines.config import load_yaml
from pipelines.errors import InputError
from pipelines.pipeline.state import FOLDER
from pipelines.storage import resolve_output
from pipelines.tiny_world import SIZES
from ray_jobs.demo_results import PIPELINE
from ray_jobs.pipeline import load_pipeline, run_planned
from ray_jobs.report import run_report
from ray_jobs.session import PROJECT_ROOT

RESULT_FILE = "results.json"
_OLD_STATE = "steps.json"  # of runs of earlier versions
_GPUS = "CUDA_VISIBLE_DEVICES"


def run_demo(out: Path, *, seed: int, size: str, force: bool) -> None:
    """Run the unfinished stages of the demo in `out`, then print the table and write the report.

    Raises:
        InputError: `out` holds a run with another seed or size, or other files.
        RuntimeError: a stage failed.
    """
    out = resolve_output(out, None)
    old = out.with_name(f".{out.name}.old")
    if force:
        _move_aside(out, old)
    _check_run(out, {"seed": seed, "size": size})
    if not (out / RESULT_FILE).is_file():
        write_configs(out, seed, size)
        with _without_gpus():
            records = run_planned(load_pipeline(_config_of(out)))
        for name, record in records.items():
            if record.state == "failed":
                log = out / FOLDER / PIPELINE / "logs" / f"{name}.log"
                raise RuntimeError(f"stage {name}: {record.reason}; log: {log}")
    run_report([out], None, force=True)
    shutil.rmtree(old, ignore_errors=True)
    _last_lines(out)


def _check_run(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError if `out` holds a run with other settings, or other files."""
    if _config_of(out).is_file():
        found = load_yaml(_config_of(out))["stages"]["world"]["config"]
    elif (out / _OLD_STATE).is_file():
        found = json.loads((out / _OLD_STATE).read_text())["settings"]
    elif out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: exists and is no run of this command; choose another --out")
    else:
        return
    if found != settings:
        told = ", ".join(f"{name}={value}" for name, value in found.items())
        raise InputError(f"{out}: holds a run with {told}; use another --out or --force")


def _config_of(out: Path) -> Path:
    """The pipeline's config in a run."""
    return out / "configs" / f"{PIPELINE}.yaml"


@contextmanager
def _without_gpus() -> Iterator[None]:
    """In the block, this process and what it starts see no GPU. The demo's two workers would need
    two; and so its bytes are the same on every machine.
    """
    before = os.environ.get(_GPUS)
    os.environ[_GPUS] = ""
    try:
        yield
    finally:
        os.environ.pop(_GPUS)
        if before is not None:
            os.environ[_GPUS] = before


def _move_aside(out: Path, old: Path) -> None:
    """Make room for a new run; the last finished run stays at `old` until the new one finishes."""
    if not any(path.is_file() for path in (_config_of(out), out / _OLD_STATE)):
        return  # no run: a new one begins here, or other files are refused
    if old.exists() and not (out / RESULT_FILE).is_file():
        shutil.rmtree(out)  # a new run that was never finished
        return
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)


def write_configs(out: Path, seed: int, size: str) -> None:
    """Write the files of configs/demo/ with a run's folder, seed and size below `out`/configs; the
    pipeline's comes last, which makes `out` a run.
    """
    folder = demo_configs()
    last = folder / f"{PIPELINE}.yaml"
    places = {"configs/demo/": f"{out}/configs/", "runs/demo": str(out)}
    for path in sorted(folder.rglob("*.yaml"), key=lambda path: (path == last, path)):
        text = path.read_text()
        comment = text.splitlines()[0]
        text = re.sub("|".join(places), lambda found: places[found[0]], text)
        values = _of_run(yaml.safe_load(text), path.stem, seed, size)
        content = f"{comment}\n{yaml.safe_dump(values, sort_keys=False)}"
        write_atomically(out / "configs" / path.relative_to(folder), content)


def _of_run(values: dict[str, Any], name: str, seed: int, size: str) -> dict[str, Any]:
    """A config's fields with a run's seed and size."""
    if "seed" in values:
        values["seed"] = seed
    lengths = SIZES[size]
    if name == "base":
        values["num_steps"] = lengths.base_steps
        values["optimizer"]["learning_rate"] = lengths.base_learning_rate
    if name == "sft":
        values["num_steps"] = lengths.sft_steps
        values["optimizer"]["learning_rate"] = lengths.sft_learning_rate
    if name == PIPELINE:
        values["stages"]["world"]["config"] = {"seed": seed, "size": size}
        values["stages"]["results"]["config"]["seed"] = seed
        del values["stages"]["report"]  # this command prints and writes it each time
    return values


def demo_configs() -> Path:
    """The folder configs/demo/: in this package if installed, else at the top of the checkout."""
    installed = Path(__file__).with_name("configs")
    return (installed if installed.is_dir() else PROJECT_ROOT / "configs") / "demo"


def _last_lines(out: Path) -> None:
    """Print how to talk to the best merge."""
    best = json.loads((out / RESULT_FILE).read_text())["best_merge"]
    body = json.dumps({"model": best, "messages": [{"role": "user", "content": "reverse b d a"}]})
    print(
        f"\nTalk to the best merge:  poise chat {out / 'models' / best}\n"
        f"or serve it:             poise serve {out / 'models' / best}\n"
        "and, in another terminal:\n"
        "  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'",
        file=sys.stderr,
    )
