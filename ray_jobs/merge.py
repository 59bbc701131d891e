"""`poise merge`: merge checkpoints without training."""

import os
import sys
from pathlib import Path

from pipelines.merge import (
    MergeConfig,
    MergePlan,
    load_merge_config,
    merge_planned,
    plan_merge,
    record_of,
)
from pipelines.merge.estimate import estimate
from pipelines.rounding import rounding_lines
from pipelines.storage import output_place
from ray_jobs.session import ray_session


def run_merge(
    config_path: Path, out: str | None, overrides: list[str], *, plan: bool, force: bool
) -> None:
    """Run the merge of a config, or show its plan."""
    config = load_merge_config(config_path, overrides)
    planned = plan_merge(config)  # checks all inputs before Ray starts
    if plan:
        _show(planned)
        return
    assert out is not None
    place = output_place(out, config.storage)
    for notice in planned.notices():
        print(notice, file=sys.stderr)
    if runs_on_ray(config):
        with ray_session():
            merge_planned(planned, place, force=force, executor="ray")
    else:
        merge_planned(planned, place, force=force)
    for name, named in planned.named.items():
        _tell(named, output_place(str(config.merges[name].out), config.storage), f"{name}: ")
    _tell(planned, place, "")
    print(f"merged model: {place}", file=sys.stderr)


def _tell(plan: MergePlan, place: Path | str, prefix: str) -> None:
    """Print what the dtype of a merge's output keeps of the change, if any number is rounded."""
    if not plan.has_small_dtypes:
        return
    for line in rounding_lines(record_of(place), "out_dtype: float32"):
        print(f"{prefix}{line}", file=sys.stderr)


def runs_on_ray(config: MergeConfig) -> bool:
    """Whether a merge runs on Ray: if the config says so, or with `auto` if a cluster is running.

    On one machine a merge takes less time than starting Ray.
    """
    if config.executor != "auto":
        return config.executor == "ray"
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


def _show(plan: MergePlan) -> None:
    """Print the plan of a merge and its cost."""
    config, cost = plan.config, estimate(plan)
    num_elements = sum(tensor.num_elements for tensor in plan.tensors.values())
    lines = {
        "method": f"{config.merge_method}: {config.method.summary}",
        "models": f"{len(plan.models)}{' and a base' if config.uses_base else ''}",
        "parameters": f"{num_elements:,} in {len(plan.tensors)} tensors",
        "to be read": f"{cost.input_bytes:,} bytes, {cost.num_passes} time(s)",
        "to be written": f"{cost.output_bytes:,} bytes in {len(plan.layout.headers)} file(s)",
        "work items": f"{len(plan.items)} for {config.num_workers} workers",
        "memory": f"about {cost.memory_bytes / 2**20:,.0f} MiB beside the program's own",
        "time": f"about {cost.seconds:,.1f} s, measured on one tensor; start-up and disk apart",
    }
    for name, text in lines.items():
        print(f"{name:16}{text}")
