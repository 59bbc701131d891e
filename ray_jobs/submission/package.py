"""What a job takes along: the working directory without results, keys and caches."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError

DEFAULT_LIMIT_MB = 100

# Patterns as in .gitignore. Ray also leaves out what the folder's .gitignore and .rayignore name.
RESULTS = ("/runs/", "/mlruns/", "/wandb/", "*.partial")
CACHES = (
    ".git",
    ".venv",
    "/venv",
    "__pycache__/",
    "*.egg-info/",
    "/build/",
    "/dist/",
    ".*_cache/",
    ".cache/",
    ".hypothesis/",
    ".ipynb_checkpoints/",
    "node_modules/",
)
KEYS = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "id_rsa*",
    "id_ecdsa*",
    "id_ed25519*",
    ".netrc",
    ".pypirc",
    ".git-credentials",
    ".ssh/",
    ".aws/",
    ".gnupg/",
    ".kube/",
    ".docker/",
    "auth_token",
    "credentials",
    "credentials.json",
    "service-account*.json",
)
EXCLUDES = (*RESULTS, *CACHES, *KEYS)


@dataclass(frozen=True, slots=True)
class Package:
    """The files of `folder` that go with a job, and their sizes in bytes."""

    folder: Path
    sizes: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """Of all files, before compression."""
        return sum(self.sizes.values())

    def environment(self) -> dict[str, object]:
        """The job's part of Ray's runtime environment."""
        return {"working_dir": str(self.folder), "excludes": list(EXCLUDES)}


def measure(folder: Path, limit_mb: int) -> Package:
    """The files that Ray would send of a folder.

    Raises:
        InputError: no such folder, or more than `limit_mb` MB; the largest files are named.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise InputError(f"--working-dir: found {folder}; allowed: a folder")
    sizes: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(folder))] = path.stat().st_size

    excludes = packaging._get_excludes(
        folder, [*ray_constants.get_runtime_env_default_excludes(), *EXCLUDES]
    )
    quiet = logging.getLogger(__name__)
    ignores = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"  # as Ray
    packaging._dir_travel(folder, [excludes], add, include_gitignore=ignores, logger=quiet)
    package = Package(folder, dict(sorted(sizes.items())))
    if package.num_bytes > limit_mb * 1e6:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        named = ", ".join(f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in largest)
        raise InputError(
            f"{folder}: found {package.num_bytes / 1e6:.1f} MB to send; allowed: {limit_mb} MB; "
            f"the largest: {named}; name what stays here in .rayignore, or raise --limit-mb"
        )
    return package
