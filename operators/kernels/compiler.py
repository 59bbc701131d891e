"""Compile C for this machine at its first use."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from threading import Lock
from typing import Any

COMPILERS = ("cc", "gcc", "clang")
# Every operation is rounded once, as written, so that bits do not depend on the vector width.
FLAGS = "-O3 -march=native -std=c11 -fno-math-errno -fno-trapping-math -ffp-contract=off".split()


class CompilerError(RuntimeError):
    """There is no C compiler, or it fails."""


def compile_library(source: Path, arguments: Mapping[str, Sequence[Any]]) -> ctypes.CDLL:
    """Compile a C file and load it. This takes a second and leaves nothing on the disk.

    Args:
        arguments: for each function, the ctypes of its arguments; all functions return nothing.

    Raises:
        CompilerError: with the first line of the compiler's message.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise CompilerError("no C compiler found")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "library.so"
        command = [compiler, *FLAGS, "-shared", "-fPIC", "-o", str(output), str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompilerError((done.stderr.strip() or f"{compiler} failed").splitlines()[0])
        library = ctypes.CDLL(str(output))
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def built_once(build: Callable[[], ctypes.CDLL]) -> Callable[[], ctypes.CDLL]:
    """A build whose library is kept; threads that want it at the same time wait for one build."""
    lock, kept = Lock(), cache(build)

    @wraps(build)
    def library() -> ctypes.CDLL:
        with lock:
            return kept()

    return library
