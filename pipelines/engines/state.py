"""What an engine knows of the weights that are in it."""

from pipelines.engines.config import EngineConfig
from pipelines.engines.weights import (
    Weights,
    check_same_config,
    check_same_shapes,
    stored_dtype,
)
from pipelines.errors import InputError


class EngineState:
    """Which model an engine holds, and whether all of it is there.

    Args:
        weights: of the engine's first model, whose names and shapes all later ones have.
    """

    def __init__(self, weights: Weights, config: EngineConfig, device: str) -> None:
        self._tensors, self._model, self._config = dict(weights.tensors), weights.config, config
        self._device, self.stored = device, stored_dtype(weights)
        self._digest, self._lost = "", "it has not started"

    @property
    def digest(self) -> str:
        """The digest of the weights that are in the engine; an error where they are not whole."""
        self._check_whole()
        return self._digest

    def loaded(self, digest: str) -> None:
        """The engine has all of these weights."""
        self._digest, self._lost = digest, ""

    def lost(self, reason: str) -> None:
        """The engine has no model, or a part of one."""
        self._digest, self._lost = "", reason

    def check(self, kind: str) -> None:
        """Raise InputError where the engine cannot do this kind of work now."""
        if kind != self._config.kind:
            raise InputError(f"engine.kind: found {self._config.kind}; allowed here: {kind}")
        self._check_whole()

    def check_swap(self, weights: Weights) -> None:
        """Raise InputError for weights that do not fit into the engine, as far as headers tell."""
        check_same_shapes(weights, self._tensors)
        check_same_config(weights, self._model)
        stored = stored_dtype(weights)
        if self._config.dtype == "auto" and stored != self.stored:
            raise InputError(
                f"swap: {weights.name}: found {stored}; allowed: {self.stored}, as in the "
                "engine's model (or an engine with its own dtype, such as float32)"
            )

    def _check_whole(self) -> None:
        if self._lost:
            raise InputError(f"engine: does not answer, as {self._lost}")
