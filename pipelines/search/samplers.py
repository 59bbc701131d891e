"""Samplers: which point of a space is tried next.

A suggestion depends on the seed, the trial's number and the results told so far, in their order,
and on nothing else: each trial has a sampler of its own, seeded by a hash of seed and number. What
a library keeps between trials (generations, a covariance matrix) is made anew from the results. So
a search that was killed goes on as one that was not, and no state is stored.
"""

import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint
from pipelines.search.entries import Variable
from pipelines.search.space import MOST_POINTS, Point, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_ONLY = {
    "draws": ("grid",),
    "num_startup": ("tpe",),
    "population": ("nsga2", "nsga3", "cma_es"),
    "start": ("cma_es",),
    "sigma": ("cma_es",),
    "patience": ("cma_es",),
}


class SamplerConfig(Config):
    """How points are chosen."""

    name: Literal["grid", "random", "tpe", "nsga2", "nsga3", "cma_es"] = "tpe"
    draws: int | None = Field(
        None,
        ge=1,
        description="of a grid: how often all is tried, with new draws of what has no "
        "steps; required where there is such",
    )
    num_startup: int = Field(10, ge=1, description="random trials before TPE has a model")
    population: int | None = Field(
        None, ge=2, description="of a generation; default 50, of CMA-ES 4 + 3 ln(variables)"
    )
    start: dict[str, float] = Field({}, description="CMA-ES's first mean; default the middles")
    sigma: float = Field(1 / 6, gt=0, description="CMA-ES's first step, as a share of the ranges")
    patience: int = Field(10, ge=1, description="generations of CMA-ES without gain before it ends")

    @model_validator(mode="after")
    def _has_effect(self) -> "SamplerConfig":
        for field, samplers in _ONLY.items():
            if field in self.model_fields_set and self.name not in samplers:
                raise ValueError(
                    f"{field}: has no effect with {self.name}; allowed with {', '.join(samplers)}"
                )
        return self


@dataclass(frozen=True, slots=True)
class Told:
    """A result as samplers see it.

    Attributes:
        losses: of the objectives; less is better.
        violations: by constraint: above 0 where it is not met.
    """

    number: int
    point: Point
    losses: tuple[float, ...]
    violations: tuple[float, ...] = ()


class Sampler(Protocol):
    """What chooses points."""

    def suggest(self, number: int, told: Sequence[Told]) -> Point | None:
        """The point of a trial; None where the sampler is at its end.

        Args:
            told: what was told before, always with the same beginning.
        """


def make_sampler(
    config: SamplerConfig, space: Space, seed: int, num_objectives: int, num_constraints: int
) -> Sampler:
    """A sampler of a space.

    Raises:
        InputError: what the sampler cannot do, or a library that is not there.
    """
    if config.name == "grid":
        return GridSampler(config, space, seed)
    if config.name == "random":
        return RandomSampler(space, seed)
    if config.name == "cma_es":
        _refuse_for_cma_es(space, num_objectives, num_constraints)
        return CmaEsSampler(config, space, seed)
    if config.name == "nsga3" and num_objectives < 2:
        raise InputError("sampler: nsga3: found one objective; allowed: two or more")
    if config.name != "tpe" and space.has_cases:
        raise InputError(f"sampler: {config.name}: knows no cases; allowed: tpe, random, grid")
    return OptunaSampler(config, space, seed, num_objectives)


def seed_of(*what: object) -> int:
    """A 32-bit seed of anything that JSON can hold."""
    return int(fingerprint(list(what))[:8], 16)


class RandomSampler:
    """Independent draws: choices and ranges evenly, those with `log` evenly by factors."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def suggest(self, number: int, told: Sequence[Told]) -> Point:
        random = np.random.default_rng(seed_of(self._seed, number))
        return self._space.chosen(lambda variable: drawn(variable, random))


def drawn(variable: Variable, random: np.random.Generator) -> Any:
    """A value of a variable, drawn evenly."""
    if variable.is_countable:
        return variable.steps[int(random.integers(len(variable.steps)))]
    if variable.integer:  # with log: each whole number has the factors around it
        wide = Variable("", low=variable.low - 0.5, high=variable.high + 0.5, log=True)
        return variable.snapped(wide.at(random.random()))
    return variable.at(random.random())


class GridSampler:
    """All points in order; several times where there is something to draw.

    Raises:
        InputError: too many points, or ranges without steps and without `draws`.
    """

    def __init__(self, config: SamplerConfig, space: Space, seed: int) -> None:
        if space.is_countable and config.draws is not None:
            raise InputError("sampler.draws: has no effect where everything has steps")
        if not space.is_countable and config.draws is None:
            bare = next(each.name for each in space.variables if not each.is_countable)
            raise InputError(
                f"sampler: grid: {bare} has no steps; give it a step, or sampler.draws"
            )
        random = np.random.default_rng(seed_of(seed, "grid"))
        points = itertools.chain.from_iterable(
            space.grid(lambda variable: drawn(variable, random)) for _ in range(config.draws or 1)
        )
        self._points = list(itertools.islice(points, MOST_POINTS + 1))
        if len(self._points) > MOST_POINTS:
            raise InputError(f"sampler: grid: found more than {MOST_POINTS:,} points")

    def __len__(self) -> int:
        return len(self._points)

    def suggest(self, number: int, told: Sequence[Told]) -> Point | None:
        return self._points[number] if number < len(self._points) else None


class OptunaSampler:
    """TPE, NSGA-II and NSGA-III of Optuna, in a study in memory that results are added to.

    Optuna counts a generation's trials as they finish; here the first `population` results are the
    first generation, and so on, whoever asks. Parents are chosen with a seed of their generation.
    """

    def __init__(self, config: SamplerConfig, space: Space, seed: int, num_objectives: int) -> None:
        self._optuna = library("optuna")
        self._config, self._space, self._seed = config, space, seed
        self._study = self._optuna.create_study(directions=["minimize"] * num_objectives)
        self._num_told = 0
        self._distributions = distributions_of(space)

    def suggest(self, number: int, told: Sequence[Told]) -> Point:
        for place in range(self._num_told, len(told)):
            self._study.add_trial(self._trial(place, told[place]))
        self._num_told = len(told)
        if self._config.name != "tpe":
            for generation in range(1, len(told) // self._population + 1):
                parents = self._sampler(seed_of(self._seed, "parents", generation))
                parents.get_parent_population(self._study, generation)
        self._study.sampler = self._sampler(seed_of(self._seed, number))
        trial = self._study.ask()
        point = self._space.chosen(lambda variable: self._suggested(trial, variable))
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)  # no part in what follows
        return point

    @property
    def _population(self) -> int:
        return self._config.population or 50

    def _sampler(self, seed: int) -> Any:
        samplers = self._optuna.samplers
        if self._config.name == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=self._config.num_startup)
        kind = samplers.NSGAIISampler if self._config.name == "nsga2" else samplers.NSGAIIISampler
        with warnings.catch_warnings():  # that NSGA-III's interface may change
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            return kind(seed=seed, population_size=self._population)

    def _trial(self, place: int, told: Told) -> Any:
        """A finished trial for the study."""
        attributes = {}
        if self._config.name != "tpe":
            key = self._sampler(0)._get_generation_key()
            attributes[key] = place // self._population
        return self._optuna.trial.create_trial(
            values=list(told.losses),
            **as_parameters(told.point, self._distributions),
            system_attrs=attributes,
            constraints={str(i): value for i, value in enumerate(told.violations)} or None,
        )

    def _suggested(self, trial: Any, variable: Variable) -> Any:
        kind: Any = self._distributions[variable.name]
        if variable.values:
            return json.loads(trial.suggest_categorical(variable.name, kind.choices))
        suggest = trial.suggest_int if variable.integer else trial.suggest_float
        value = suggest(variable.name, kind.low, kind.high, step=kind.step, log=kind.log)
        return variable.snapped(value)


def distributions_of(space: Space) -> "dict[str, BaseDistribution]":
    """Optuna's distributions of the variables, by name; values of choices are JSON."""
    kinds = library("optuna").distributions

    def distribution(variable: Variable) -> "BaseDistribution":
        if variable.values:
            return kinds.CategoricalDistribution([json.dumps(each) for each in variable.values])
        low, high, step = variable.low, variable.high, variable.step
        if step is not None:  # Optuna wants a whole number of steps
            high = float(variable.steps[-1])
        if variable.integer:
            return kinds.IntDistribution(int(low), int(high), variable.log, int(step or 1))
        return kinds.FloatDistribution(low, high, variable.log, step)

    return {each.name: distribution(each) for each in space.variables}


def as_parameters(
    point: Point, distributions: "Mapping[str, BaseDistribution]"
) -> dict[str, dict[str, Any]]:
    """A point as Optuna's `create_trial` takes it."""
    own = {name: distributions[name] for name in point}
    values = {
        name: json.dumps(value) if hasattr(own[name], "choices") else value
        for name, value in point.items()
    }
    return {"params": values, "distributions": own}


class CmaEsSampler:
    """CMA-ES (Hansen 2016, arXiv 1604.00772), of the package `cmaes`, on the shares of the ranges.

    A generation is the next `population` results. The state (mean, covariance, step, paths) follows
    from the results, so it is made anew by telling them all again. Steps are taken of what CMA-ES
    drew, which itself stays as it is.
    """

    def __init__(self, config: SamplerConfig, space: Space, seed: int) -> None:
        self._cmaes = library("cmaes")
        self._config, self._variables, self._seed = config, space.variables, seed
        for name in config.start:
            if name not in [each.name for each in self._variables]:
                known = ", ".join(each.name for each in self._variables)
                raise InputError(f"sampler.start: found {name!r}; allowed: {known}")
        start = config.start
        self._mean = [
            min(max(each.share(start[each.name]), 0.0), 1.0) if each.name in start else 0.5
            for each in self._variables
        ]
        self._optimizer, self._num_told = self._new_optimizer(), 0

    @property
    def population(self) -> int:
        """4 + floor(3 ln n) unless the config says otherwise."""
        return self._config.population or 4 + int(3 * np.log(len(self._variables)))

    def suggest(self, number: int, told: Sequence[Told]) -> Point | None:
        size = self.population
        generations = [told[a : a + size] for a in range(0, len(told) - size + 1, size)]
        if self._has_stalled(generations):
            return None
        for generation in generations[self._num_told :]:
            solutions = [(self._shares(each.point), each.losses[0]) for each in generation]
            self._optimizer.tell(solutions)
        self._num_told = len(generations)
        if self._optimizer.should_stop():
            return None
        self._optimizer.reseed_rng(seed_of(self._seed, number))
        shares = self._optimizer.ask()
        return {each.name: each.at(float(shares[i])) for i, each in enumerate(self._variables)}

    def _has_stalled(self, generations: Sequence[Sequence[Told]]) -> bool:
        """Whether the best has not become better for so many generations."""
        best = [min(each.losses[0] for each in generation) for generation in generations]
        patience = self._config.patience
        return len(best) > patience and min(best[-patience:]) >= min(best[:-patience])

    def _new_optimizer(self) -> Any:
        # The package wants two dimensions or more: a single variable gets one beside it that does
        # nothing.
        count = max(2, len(self._variables))
        return self._cmaes.CMA(
            mean=np.array([*self._mean, 0.5][:count]),
            sigma=self._config.sigma,
            bounds=np.array([[0.0, 1.0]] * count),
            population_size=self.population,
        )

    def _shares(self, point: Point) -> "np.ndarray[Any, np.dtype[np.float64]]":
        shares = [each.share(point[each.name]) for each in self._variables]
        return np.array([*shares, 0.5][: max(2, len(shares))])


def _refuse_for_cma_es(space: Space, num_objectives: int, num_constraints: int) -> None:
    """Raise InputError for what CMA-ES cannot do."""
    for variable in space.variables:
        if variable.values:
            raise InputError(
                f"sampler: cma_es: {variable.name} is a choice; allowed: ranges and simplexes"
            )
    if num_objectives > 1:
        raise InputError(
            f"sampler: cma_es: found {num_objectives} objectives; allowed: one, which may be a "
            "weighted sum"
        )
    if num_constraints:
        raise InputError("sampler: cma_es: knows no constraints; allowed: tpe, nsga2, nsga3")


def library(name: str) -> ModuleType:
    """Optuna or cmaes.

    Raises:
        InputError: it is not installed.
    """
    import importlib

    try:
        library = importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"sampler: needs the package {name}; install it with: pip install 'poise[search]'"
        ) from None
    if name == "optuna":
        library.logging.set_verbosity(library.logging.WARNING)
    return library
