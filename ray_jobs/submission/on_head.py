"""What `poise submit` runs on the head in the job's own environment, before the job: which Poise
is found there, which nodes there are, and which the autoscaler may add. It prints one JSON line.

The head may have no Poise, or another version: this file is sent as text, and imports nothing of
Poise that it can do without.
"""

import json
import logging
import os
import shutil
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MARK = "poise-head: "


def installed() -> dict[str, object]:
    """The Poise that a job would run: its version, its commands, and whether it was sent along."""
    found: dict[str, object] = {"version": None, "commands": None, "sent": False}
    with suppress(PackageNotFoundError):
        found["version"] = version("poise")
    try:
        from ray_jobs import cli
    except Exception:
        return found
    here = Path.cwd().resolve()
    if here in Path(cli.__file__).resolve().parents:
        project = here / "pyproject.toml"
        text = project.read_text() if project.is_file() else ""
        found["version"] = tomllib.loads(text).get("project", {}).get("version", found["version"])
        found["sent"] = True
    found["commands"] = sorted(
        command.name or command.callback.__name__.replace("_", "-")
        for command in cli.app.registered_commands
        if command.callback is not None
    )
    return found


def autoscaler(address: str) -> object:
    """The kinds of nodes that may be added: their resources, and how many of each.

    Empty where the cluster does not grow; None where that cannot be read here, as under KubeRay,
    whose autoscaler has a container of its own.
    """
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended, or is another user's
            continue
        monitor = any(w.endswith("monitor.py") and "autoscaler" in w for w in words)
        if not monitor or f"--gcs-address={address}" not in words:
            continue
        flag = "--autoscaling-config="
        paths = [word.removeprefix(flag) for word in words if word.startswith(flag)]
        return kinds_of(paths[0]) if paths else {}
    return None


def kinds_of(path: str) -> object:
    """The kinds of nodes of the autoscaler's config; None if it cannot be read."""
    import yaml

    try:
        config = yaml.safe_load(Path(path).expanduser().read_text())
        total = config.get("max_workers", 2)
        others = {config.get("head_node_type"): 0}  # no more heads, unless it says so
        return {
            name: {
                "resources": kind.get("resources") or {},
                "most": min(total, kind.get("max_workers", others.get(name, total))),
            }
            for name, kind in config["available_node_types"].items()
        }
    except (OSError, yaml.YAMLError, KeyError, AttributeError):
        return None


def main() -> None:
    """Print what is found, after `MARK`."""
    import ray

    address = os.environ["RAY_ADDRESS"]
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    scripts = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    found = {
        "poise": installed(),
        "ray": ray.__version__,
        "scripts": scripts,
        "path": path,
        "script": shutil.which("poise", path=f"{scripts}{os.pathsep}{path}") is not None,
        "nodes": [node["Resources"] for node in ray.nodes() if node["Alive"]],
        "autoscaler": autoscaler(address),
    }
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
