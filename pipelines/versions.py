"""Versions of what a result depends on, for provenance files."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("poise", "torch", "ray", "transformers", "safetensors", "numpy", "deepspeed", "peft")


def versions() -> dict[str, str]:
    """Python and the installed packages that take part in training, merging and measuring."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
