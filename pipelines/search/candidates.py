"""Candidates in memory: merges whose tensors go straight into one running engine.

Nothing is written, and yet a candidate in the engine is the model that `poise merge` would write:
its digests, answers and cells of a store are the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.checkpoints.hub import bring
from pipelines.config import check
from pipelines.engines import EngineConfig, open_engine
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.engines.weights import MergeWeights, Weights
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint
from pipelines.merge import MergeConfig, plan_merge
from pipelines.merge.card import digest_of_companions
from pipelines.merge.kept import Kept
from pipelines.merge.plan import MergePlan, Opened
from pipelines.search.timing import Clock, TimedWeights

if TYPE_CHECKING:
    from pipelines.engines.interface import Engine

CANDIDATE = "candidate"


class Candidates:
    """One engine, and the opened models that candidates are merged of.

    Args:
        first: a model of the candidates' shapes, with which vLLM starts.
        kept_bytes: of models, task vectors and singular vectors that stay in memory.
        keeps_models: models stay open from one candidate to the next.
        offline: fetch nothing of the hub's models.
    """

    def __init__(
        self,
        engine: EngineConfig,
        first: str | Path,
        *,
        kept_bytes: int = 1 << 30,
        keeps_models: bool = True,
        offline: bool = False,
    ) -> None:
        self._config, self._first, self._offline = engine, first, offline
        self._keeps_models = keeps_models
        self._opened, self._kept = Opened(), Kept(kept_bytes)
        self._companions: dict[str, str] = {}
        self._engine: Engine | None = None

    @property
    def engine(self) -> "Engine":
        """The engine with the last candidate."""
        assert self._engine is not None, "no candidate yet"
        return self._engine

    def planned(self, candidate: MergeConfig | Mapping[str, Any]) -> MergePlan:
        """A candidate's plan.

        Args:
            candidate: a merge's config, checked or as its YAML has it.

        Raises:
            InputError: a merge that cannot be, or models whose files have changed since they were
                opened.
        """
        if not isinstance(candidate, MergeConfig):
            candidate = check(dict(candidate), MergeConfig, CANDIDATE)
        if not self._keeps_models:
            self._opened = Opened()
        self._opened.check_unchanged()
        plan = plan_merge(candidate, self._opened)
        for name in plan.named:
            raise InputError(f"merges.{name}.out: has no effect in a merge that is not written")
        return plan

    def put(self, plan: MergePlan, clock: Clock) -> str:
        """Put a candidate into the engine, which may have to start; returns the weights' digest.

        Raises:
            InputError: other shapes than the engine's.
        """
        weights = TimedWeights(MergeWeights(plan, self._kept))
        is_local = self._config.name == "transformers"
        source: Weights = weights if is_local else weights.weights
        with clock.part("swap"):
            if self._engine is None and is_local:
                self._engine = TransformersEngine(source, self._config)
            else:
                self._start().swap(source)
        clock.move("swap", "merge", weights.seconds)
        return self.engine.weights

    def companions(self, plan: MergePlan) -> str:
        """The digest of the files that would stand beside a candidate's weights."""
        files = plan.files
        copied = {
            place: [str(path), path.stat().st_mtime_ns] for place, path in files.copied.items()
        }
        key = fingerprint([files.config, files.written, copied])
        if key not in self._companions:
            self._companions[key] = digest_of_companions(files)
        return self._companions[key]

    def close(self) -> None:
        """Free the engine; the next candidate starts it again."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _start(self) -> "Engine":
        """The engine; vLLM starts from a folder."""
        if self._engine is None:
            bring([str(self._first)], offline=self._offline)
            self._engine = open_engine(self._first, self._config)
        return self._engine
