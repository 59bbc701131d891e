"""The findings in sentences, computed from the numbers alone, good or bad."""

from collections.abc import Sequence

from pipelines.report.comparison import (
    SAME_LENGTH,
    Difference,
    compared,
    have_one_length,
    losses,
    mixture_aligned,
    own_strength,
    single_strength,
)
from pipelines.report.results import COLUMNS, ModelResults, Results

_AVERAGE = COLUMNS[-1]


def findings(results: Results) -> list[str]:
    """Sentences about one run: own strengths, the tax, the best merge, mixtures, the choice."""
    return [
        *_own_strengths(results),
        *_taxes(results),
        *_best_merge(results),
        *_mixtures(results),
        *_choice(results),
    ]


def findings_over_runs(runs: Sequence[Results]) -> list[str]:
    """For each main claim, in how many of several runs it holds."""
    total = len(runs)
    sentences = []
    for name, model in single_strength(runs[0]).items():
        strength = str(own_strength(name, model))
        deltas = [_against_sft(run, name, strength) for run in runs]
        above = sum(delta.value > 0 for delta in deltas)
        clear = sum(delta.value > 0 and delta.is_clear for delta in deltas)
        sentences.append(
            f"Own strength: {name} is above {runs[0].sft_name} on {strength} in {above} of {total} "
            f"runs, by more than two standard errors in {clear}."
        )
    taxed = sum(bool(losses(run, single_strength(run))) for run in runs)
    sentences.append(f"Tax: some single-strength model pays one in {taxed} of {total} runs.")
    deltas = [delta for run in runs if (delta := _merge_against_singles(run)[2]) is not None]
    above = sum(delta.value > 0 for delta in deltas)
    clear = sum(delta.value > 0 and delta.is_clear for delta in deltas)
    sentences.append(
        "Best merge (chosen on development): its average on test is above that of every "
        f"single-strength model in {above} of {total} runs, by more than two standard errors of "
        f"the difference in {clear}."
    )
    return sentences


def _against_sft(results: Results, name: str, column: str) -> Difference:
    """The difference between a model and SFT."""
    return compared(results, name, results.sft_name, column)


def _own_strengths(results: Results) -> list[str]:
    """Does each single-strength model beat SFT on its own strength?"""
    sentences = []
    for name, model in single_strength(results).items():
        strength = str(own_strength(name, model))
        delta = _against_sft(results, name, strength)
        place = _place(delta, results.sft_name)
        sentences.append(f"Own strength: on {strength}, {name} is {place}.")
    return sentences


def _place(delta: Difference, other: str) -> str:
    """A difference in words, and whether it is more than noise."""
    if delta.value == 0:
        return f"level with {other}"
    side = "above" if delta.value > 0 else "below"
    noise = "" if delta.is_clear else ", within two standard errors of the difference"
    return f"{side} {other} by {delta}{noise}"


def _taxes(results: Results) -> list[str]:
    """The losses of single-strength models, of mixtures and of merges."""
    groups = (
        ("single-strength model", single_strength(results)),
        ("mixture model", mixture_aligned(results)),
        ("merge", results.of_kind("merge")),
    )
    return [_tax(results, group, models) for group, models in groups if models]


def _tax(results: Results, group: str, models: dict[str, ModelResults]) -> str:
    """The clear losses against SFT in a group of models."""
    found = losses(results, models)
    if not found:
        return (
            f"Tax: no {group} is below {results.sft_name} on any strength by more than two "
            "standard errors of the difference."
        )
    parts = [f"{name} loses {delta} of {strength}" for name, strength, delta in found]
    return f"Tax: {'; '.join(parts)}."


def _merge_against_singles(results: Results) -> tuple[str, str, Difference | None]:
    """The best merge, the best single-strength model by average, and their difference."""
    singles = single_strength(results)
    if not singles:
        return results.best_merge, "", None
    best = max(singles, key=lambda name: singles[name].average.value)
    return results.best_merge, best, compared(results, results.best_merge, best, _AVERAGE)


def _best_merge(results: Results) -> list[str]:
    """Is the merge that was chosen on development above all single-strength models on test?"""
    merge, best, delta = _merge_against_singles(results)
    if delta is None:
        return []
    average = results.models[merge].average
    start = (
        f"Best merge: {merge}, chosen on development, averages {average.value:.1f} "
        f"±{average.stderr:.1f} on test"
    )
    every = "above" if delta.value > 0 else "not above"
    return [
        f"{start}, {every} every single-strength model: against the best of them, it is "
        f"{_place(delta, best)}."
    ]


def _mixtures(results: Results) -> list[str]:
    """The best merge against the best mixture model, and the other mixtures against the first."""
    mixtures = mixture_aligned(results)
    if not mixtures:
        return []
    best = max(mixtures, key=lambda name: mixtures[name].average.value)
    delta = compared(results, results.best_merge, best, _AVERAGE)
    sentences = [
        f"Mixture: on average, {results.best_merge} is {_place(delta, best)}, the best of the "
        "models trained on the mixture."
    ]
    plain, *others = mixtures
    return sentences + [_optimizers(results, name, plain) for name in others]


def _optimizers(results: Results, name: str, plain: str) -> str:
    """One optimizer against another, if both have moved the weights by one length: a longer way
    alone changes the scores as another optimizer would.
    """
    norms = results.models[name].delta_norm, results.models[plain].delta_norm
    if norms[0] is None or norms[1] is None:
        return (
            f"Optimizers: {name} and {plain} are not compared: the norms of their deltas are not "
            "known."
        )
    if not have_one_length((norms[0], norms[1])):
        return (
            f"Optimizers: {name} and {plain} are not compared: the norms of their deltas, "
            f"{norms[0]:.2f} and {norms[1]:.2f}, differ by more than {SAME_LENGTH:.0%}."
        )
    delta = compared(results, name, plain, _AVERAGE)
    return (
        f"Optimizers: on average, {name} is {_place(delta, plain)}, at deltas of norms "
        f"{norms[0]:.2f} and {norms[1]:.2f}."
    )


def _choice(results: Results) -> list[str]:
    """Is another merge better on test than the one that was chosen on development?"""
    merges = results.of_kind("merge")
    chosen = merges[results.best_merge]
    best = max(merges, key=lambda name: merges[name].average.value)
    if merges[best].average.value <= chosen.average.value:
        return [f"Choice: {results.best_merge} is the best merge on test, too."]
    delta = compared(results, best, results.best_merge, _AVERAGE)
    return [
        f"Choice: on test another merge averages more: {best} is "
        f"{_place(delta, results.best_merge)}."
    ]
