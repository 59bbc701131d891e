"""AlpacaEval 2's length-controlled win rate (Dubois et al. 2024, "Length-controlled AlpacaEval").

A model's preferences are fitted by a logistic regression without intercept,

    p(model preferred) = sigmoid(w_1 tanh(d / std(d)) + w_2 difficulty + w_3),

d the baseline's length less the model's, in characters, and difficulty that of the instruction,
which the published file `df_gamed.csv` has. The rate is the mean of the predictions at d = 0. That
file also has the preferences between the baseline and versions of itself that were told to be short
or long; there w_3's feature is 0, and they weigh 0.2 together, which keeps w_1 and w_2 near what
they are for the baseline. The penalty is L1, its strength C chosen by 5-fold cross-validation.
Without the file, the second term and these rows are left out: `length_controlled_minimal`. Where
all answers are as long as the baseline's, nothing is to be controlled: the rate is the win rate.
"""

import csv
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import InputError

Array = NDArray[np.float64]
WEIGHT_OF_GAMED = 0.2 / 2  # two versions of the baseline
FOLDS = 5
BOOTSTRAPS = 100
_CS = np.logspace(-4, 4, 10)
_CERTAIN = 30.0
_SEED = 123  # of liblinear's order of coordinates, as the package has it
_COLUMNS = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


@dataclass(frozen=True)
class Gamed:
    """The published file: R rows of the baseline's versions, and difficulties.

    Attributes:
        design: (R, 3) their features; the third is 0.
        preference: (R,) in [0, 1].
        difficulty: by number of the instruction.
    """

    design: Array
    preference: Array
    difficulty: dict[int, float]


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """A rate in percent; its standard error from bootstrap samples of instructions with C held;
    and the weights by feature.
    """

    name: str
    value: float
    stderr: float
    weights: dict[str, float]


def win_rate(preferences: Array) -> tuple[float, float]:
    """The win rate and its standard error, in percent.

    Args:
        preferences: (n,) for the model's answers, in [0, 1].
    """
    error = preferences.std(ddof=1) / math.sqrt(len(preferences)) if len(preferences) > 1 else 0.0
    return 100 * float(preferences.mean()), 100 * float(error)


def read_gamed(path: Path) -> Gamed:
    """Read `df_gamed.csv`.

    Raises:
        InputError: it cannot be read, or lacks a column, or holds no numbers.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("it holds no rows")
        table = {name: [_number(row[name]) for row in rows] for name in _COLUMNS}
    except OSError as error:
        raise InputError(f"difficulty: {path}: {error.strerror}") from None
    except KeyError as error:
        raise InputError(f"difficulty: {path}: has no column {error}") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"difficulty: {path}: not the published table: {error}") from None
    hard = np.asarray(table["instruction_difficulty"])
    lengths = np.tanh(table["std_delta_len"])
    design = np.stack([lengths, hard, np.asarray(table["not_gamed_baseline"])], axis=1)
    difficulty: dict[int, float] = {}
    for number, value in zip(table["index"], hard, strict=True):
        difficulty.setdefault(int(number), float(value))
    return Gamed(design, np.asarray(table["preference"]), difficulty)


def _number(text: str) -> float:
    """A number of the table; Python's True and False are numbers too."""
    value = {"True": 1.0, "False": 0.0}.get(text)
    value = float(text) if value is None else value
    if not math.isfinite(value):
        raise ValueError(f"found {text!r}")
    return value


def length_controlled(
    preferences: Array,
    length_baseline: NDArray[Any],
    length_model: NDArray[Any],
    instructions: NDArray[Any],
    gamed: Gamed | None,
) -> LengthControlled:
    """The win rate at equal length.

    Args:
        preferences: (n,) in [0, 1]; NaN: unknown, which is predicted but not fitted.
        length_baseline: (n,) characters of the baseline's answers; `length_model` of the model's.
        instructions: (n,) their numbers in the published set.
        gamed: the published file.
    """
    require_sklearn()
    delta = (length_baseline - length_model).astype(np.float64)
    spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
    name = "length_controlled" if gamed is not None else "length_controlled_minimal"
    if not delta.any():
        return LengthControlled(name, *win_rate(preferences[~np.isnan(preferences)]), {})
    features = [np.tanh(delta / spread) if spread > 0 else np.zeros_like(delta)]
    names = ["length"]
    if gamed is not None:
        features.append(np.asarray([gamed.difficulty[int(number)] for number in instructions]))
        names.append("difficulty")
    own = np.stack([*features, np.ones_like(delta)], axis=1)
    at_zero = own.copy()
    at_zero[:, 0] = 0.0
    known = ~np.isnan(preferences)
    rows = _with_gamed(own[known], preferences[known], gamed)
    C = choose_c(*rows)
    w = fit(*rows, C)
    rates = 100 * _sigmoid(at_zero @ w)
    error = _bootstrap_error(own[known], at_zero[known], preferences[known], gamed, C)
    weights = dict(zip([*names, "constant"], map(float, w), strict=True))
    return LengthControlled(name, float(rates.mean()), error, weights)


def require_sklearn() -> None:
    """Raise InputError where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise InputError(
            "alpaca_eval: scikit-learn is not installed (pip install 'poise[evaluation]')"
        ) from None


def choose_c(X: Array, y: Array, weight: Array) -> float:
    """The strength of the penalty with the best mean log-likelihood over the folds.

    A row and its counterpart of the other class, in which `fit` splits it, are in one fold.
    """
    from sklearn.model_selection import GroupKFold

    folds = min(FOLDS, len(y))
    if folds < 2:
        return float(_CS[-1])
    groups = np.tile(np.arange(len(y)), 2)
    likelihoods = np.zeros(len(_CS))
    for train, test in GroupKFold(folds).split(groups, groups=groups):
        kept, left = groups[train][: len(train) // 2], groups[test][: len(test) // 2]
        for place, C in enumerate(_CS):
            w = fit(X[kept], y[kept], weight[kept], C)
            p = np.clip(_sigmoid(X[left] @ w), 1e-15, 1 - 1e-15)
            own = y[left] * np.log(p) + (1 - y[left]) * np.log1p(-p)
            likelihoods[place] += np.mean(weight[left] * own) / folds
    return float(_CS[np.argmax(likelihoods)])


def fit(X: Array, y: Array, weight: Array, C: float) -> Array:
    """The weights of a logistic regression on shares: each row counts as one of either class, with
    the weights y and 1 - y.

    Args:
        X: (n, d), the last column 1 in rows of the model.
        y: (n,) in [0, 1], n > 0.
        weight: (n,) of the rows.
        C: inverse strength of the L1 penalty.

    Returns:
        (d,) the weights.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if np.ptp(y) == 0 and y[0] in (0.0, 1.0):  # no maximum: the constant stands for infinity
        return np.append(np.zeros(X.shape[1] - 1), _CERTAIN if y[0] else -_CERTAIN)
    model = LogisticRegression(
        C=C, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=_SEED
    )
    classes = np.repeat([1, 0], len(y))
    shares = np.concatenate([y * weight, (1 - y) * weight])
    with warnings.catch_warnings():
        # 100 steps, as in the package, do not always reach liblinear's tolerance where C is large.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(np.concatenate([X, X]), classes, sample_weight=shares)
    return np.asarray(model.coef_[0], np.float64)


def _with_gamed(X: Array, y: Array, gamed: Gamed | None) -> tuple[Array, Array, Array]:
    """Features, preferences and weights of the model's rows, after those of the published file."""
    weight = np.ones(len(y))
    if gamed is None:
        return X, y, weight
    light = np.full(len(gamed.preference), WEIGHT_OF_GAMED)
    return (
        np.concatenate([gamed.design, X]),
        np.concatenate([gamed.preference, y]),
        np.concatenate([light, weight]),
    )


def _bootstrap_error(
    own: Array, at_zero: Array, preferences: Array, gamed: Gamed | None, C: float
) -> float:
    """The rate's standard error in percent; NaN for fewer than two instructions."""
    n = len(preferences)
    if n < 2:
        return math.nan
    generator = np.random.default_rng(0)
    rates = []
    for _ in range(BOOTSTRAPS):
        drawn = generator.integers(n, size=n)
        rows = _with_gamed(own[drawn], preferences[drawn], gamed)
        rates.append(100 * _sigmoid(at_zero[drawn] @ fit(*rows, C)).mean())
    return float(np.std(rates, ddof=1))


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -x))
