"""Where the seconds of a candidate go."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines.engines.weights import Described, MergeWeights


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block as a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def move(self, of: str, to: str, seconds: float) -> None:
        """Count a piece of one part as another's."""
        self.add(of, -seconds)
        self.add(to, seconds)


class TimedWeights:
    """`Weights` that count the seconds in which they are made."""

    def __init__(self, weights: MergeWeights) -> None:
        self.weights, self.seconds = weights, 0.0

    @property
    def name(self) -> str:
        return self.weights.name

    @property
    def config(self) -> dict[str, Any]:
        return self.weights.config

    @property
    def tensors(self) -> Mapping[str, Described]:
        return self.weights.tensors

    @property
    def text_files(self) -> Mapping[str, Path | str]:
        return self.weights.text_files

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        stream = self.weights.stream()
        while True:
            start = time.perf_counter()
            try:
                each = next(stream)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield each
