"""Attacks on a prompt template: DeepWordBug, a masked language model's words, words of a table, and
StressTest.

Their settings are those of PromptBench (Zhu et al. 2024) as "Mixup Model Merge" uses them: three
words at drawn places, one after the other, each with the candidate that lowers the metric most.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint
from pipelines.robustness.config import AttackConfig
from pipelines.robustness.edits import NUM_KINDS, edits, levenshtein
from pipelines.robustness.masked_model import checkpoint_digest, open_encoder, open_masked_model
from pipelines.robustness.search import (
    Asking,
    Candidates,
    Found,
    Objective,
    greedy,
    num_rankings,
    ranked,
    worst,
)
from pipelines.robustness.sources import Table, WordNet, open_source
from pipelines.robustness.template import STOP_WORDS, PromptTemplate, is_word

# Naik et al. 2018, "Stress test evaluation for natural language inference".
STRESS = (" and true is true ", " and false is not true ", " and true is true " * 5)


class Attack:
    """An attack that is ready to run on one prompt.

    Args:
        start: the prompt as it is.
        labels: words of the task's labels, which stay.

    Raises:
        InputError: no word of the prompt may be changed, a source or a model that is not there or
            does not fit, or fewer queries than the ranking asks.
    """

    def __init__(self, config: AttackConfig, start: PromptTemplate, labels: Sequence[str]) -> None:
        self.config, self.start = config, start
        self._source = None if config.source is None else open_source(config.source)
        _check_source(config, self._source)
        self._words = start.changeable((*labels, *config.protect))
        if config.attack != "stresstest" and not self._words:
            raise InputError(
                f"{config.full_name}: no word of the prompt may be changed: {start.shown!r} has "
                "stop words, words of labels and protected words only"
            )
        if config.max_queries is not None and config.max_queries <= self._num_rankings:
            raise InputError(
                f"{config.full_name}: max_queries: found {config.max_queries}; allowed: more than "
                f"{self._num_rankings}, which the ranking {config.ranking} asks"
            )
        self.identity: dict[str, Any] = {
            **config.identity(),
            "files": [
                None if self._source is None else self._source.digest,
                config.model and checkpoint_digest("model", config.model),
                config.encoder and checkpoint_digest("encoder", config.encoder),
            ],
            "kept": sorted({label.casefold() for label in labels}),
            "stop_words": fingerprint(sorted(STOP_WORDS)),
            **({"joined": True} if config.attack == "bertattack" and not config.mask else {}),
        }

    @property
    def most_queries(self) -> int:
        """How many prompts are asked at most, beside the unattacked one."""
        if self.config.attack == "stresstest":
            return len(STRESS)
        each = NUM_KINDS if self.config.attack == "deepwordbug" else self.config.candidates
        most = self._num_rankings + each * min(self.config.words, len(self._words))
        return most if self.config.max_queries is None else min(most, self.config.max_queries)

    def run(self, objective: Objective) -> Found:
        """Search the prompt with the lowest score.

        Raises:
            InputError: none of the words that came up has a candidate.
        """
        asking = Asking(objective, self.start, self.config.max_queries)
        if self.config.attack == "stresstest":
            return worst([self.start.with_end(text) for text in STRESS], asking)
        order = ranked(self.start, self._words, self.config.ranking, self.config.seed, asking)
        order = order[: self.config.words]
        found = greedy(self.start, order, self._candidates(), asking, self._allowed())
        if len(found.without_candidates) == len(order):
            words = ", ".join(found.without_candidates)
            raise InputError(f"{self.config.full_name}: no other word was found for: {words}")
        return found

    @property
    def _num_rankings(self) -> int:
        return num_rankings(self.config.ranking, len(self._words))

    def _candidates(self) -> Candidates:
        """What is tried in place of a word."""
        config, source = self.config, self._source
        if config.attack == "deepwordbug":
            table = source.entries if isinstance(source, Table) else None

            def edited(template: PromptTemplate, place: int) -> Sequence[str]:
                return edits(template.pieces[place], Random(f"{config.seed} {place}"), table)

            return edited
        if config.attack == "bertattack":
            assert config.model is not None
            model = open_masked_model(config.model)

            def likely(template: PromptTemplate, place: int) -> Sequence[str]:
                before, after = template.around(place)
                word = template.pieces[place]
                return model.words(before, word, after, config.candidates, mask=config.mask)

            return likely
        assert source is not None

        def listed(template: PromptTemplate, place: int) -> Sequence[str]:
            words = source.words(template.pieces[place])
            return [each for each in words if is_word(each)][: config.candidates]

        return listed

    def _allowed(self) -> Callable[[PromptTemplate], bool]:
        """Whether a prompt keeps the attack's bounds."""
        if self.config.attack == "deepwordbug":
            return lambda each: num_edits(self.start, each) <= self.config.max_edits
        if self.config.encoder is None:
            return lambda each: True
        encoder, least = open_encoder(self.config.encoder), self.config.min_cosine
        return lambda each: encoder.cosine(self.start.shown, each.shown) >= least


def num_edits(first: PromptTemplate, second: PromptTemplate) -> int:
    """The characters that differ, word by word: at least the Levenshtein distance of the whole."""
    return sum(levenshtein(a, b) for a, b in zip(first.pieces, second.pieces, strict=True))


def _check_source(config: AttackConfig, source: Table | WordNet | None) -> None:
    """Raise InputError for a table of words where characters are wanted, or the other way round."""
    wants_characters = config.attack == "deepwordbug"
    if source is None:
        return
    is_of_characters = isinstance(source, Table) and source.is_of_characters
    if wants_characters != is_of_characters:
        kinds = ("characters", "words")
        found, allowed = kinds if is_of_characters else kinds[::-1]
        raise InputError(
            f"{config.full_name}: source: {config.source}: found a table of {found}; allowed with "
            f"{config.attack}: {allowed}"
        )
