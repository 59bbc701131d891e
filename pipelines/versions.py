"""Versions of Python and packages, for the records of results."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("poise", "torch", "ray", "transformers", "safetensors", "numpy", "deepspeed", "peft")


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages in `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
