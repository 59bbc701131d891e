"""A task of lm-evaluation-harness in pieces that can be done apart: which documents it has, what it
asks about a range of them, what the answers are worth, and the numbers of all.

Each piece is a function of the task and of plain values alone, so a range may be done in another
process or again, with the same result.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from pipelines.engines import answer_seed
from pipelines.errors import InputError
from pipelines.evaluate.harness.grading import Grading
from pipelines.evaluate.harness.library import FAILURES, first_line
from pipelines.evaluate.harness.requests import Answer, Kind, Request, sampling_of
from pipelines.evaluate.harness.splits import Documents, Split, digest
from pipelines.evaluate.harness.values import callables, plain, plain_config
from pipelines.fingerprint import fingerprint_file, fingerprint_work

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task as LibraryTask

ChatTemplate = Callable[..., str]  # (messages, add_generation_prompt=...) -> text
OutputType = Literal["generate_until", "loglikelihood", "loglikelihood_rolling", "multiple_choice"]
_KINDS: dict[str, Kind] = {
    "generate_until": "generate",
    "loglikelihood": "log_likelihood",
    "loglikelihood_rolling": "rolling",
}
# What only says where data lie; the documents themselves are in a fingerprint.
_PLACES = ("dataset_path", "dataset_name", "dataset_kwargs")


@dataclass(frozen=True, slots=True)
class Chat:
    """How prompts become conversations.

    Attributes:
        wanted: put prompts into the model's chat template.
        system: a message before all others; without a chat template, a text before the prompt.
        multiturn: few-shot examples are turns, not one text of the user.
    """

    wanted: bool = False
    system: str | None = None
    multiturn: bool = True


@dataclass(frozen=True, slots=True)
class Score:
    """What one document's answers are worth, under one of the task's filters.

    Attributes:
        document: its place in the task's documents.
        metrics: the library's items: numbers, or what its aggregation takes (such as the
            log-likelihood and the number of words); plain values, which JSON can hold.
        responses: what the filter left of the answers to each request; plain values too.
    """

    document: int
    filter: str
    metrics: Mapping[str, Any]
    responses: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """A number over documents. It is a mean of numbers in [0, 1] (an accuracy) or what the task's
    own aggregation gives: a perplexity, an F1, a BLEU score.

    Attributes:
        n: documents that have it.
        is_mean: whether `value` is the mean over documents.
    """

    value: float
    n: int
    is_mean: bool
    higher_is_better: bool | None


@dataclass
class Task:
    """One task on one split.

    Args:
        library: the library's task.
        documents: those of the split.
        limit: only so many documents, from the first on.
        seed: of few-shot examples and of sampled answers.
        num_fewshot: examples before each question.
        chat: how prompts become conversations.
    """

    library: "LibraryTask"
    documents: Documents
    split: Split
    limit: int | None
    seed: int
    num_fewshot: int
    chat: Chat
    # Documents whose few-shot examples are drawn; None where the generator's state is not known.
    _drawn: int | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.library.task_name)

    @property
    def output_type(self) -> OutputType:
        """What it asks of an engine."""
        kind: OutputType = self.library.OUTPUT_TYPE
        return kind

    def __len__(self) -> int:
        """The number of its documents."""
        chosen = len(self.documents.chosen)
        return chosen if self.limit is None else min(chosen, self.limit)

    def document(self, place: int) -> Mapping[str, Any]:
        """One of its documents, by its place in [0, len)."""
        found: Mapping[str, Any] = self.documents.all[self.documents.chosen[place]]
        return found

    @property
    def ids(self) -> tuple[int, ...]:
        """The number of each document in the task's own split, the library's `doc_id`."""
        return self.documents.chosen[: len(self)]

    @property
    def clusters(self) -> tuple[str, ...]:
        """The cluster of each document."""
        return self.documents.clusters[: len(self)]

    @property
    def remark(self) -> str:
        """What the split is, in words: of use where it is a half."""
        source = self.documents.source
        if not self.documents.is_halved:
            return source
        return f"half of {source or 'its only split'}, by a hash of clusters with seed {self.seed}"

    @property
    def metrics(self) -> list[str]:
        """The names of its metrics; functions may give more."""
        own = [] if self.grading and self.grading.alone else list(self.library.aggregation())
        return own + ([self.grading.name] if self.grading else [])

    def higher_is_better(self, metric: str) -> bool | None:
        """Whether more of a metric is better; None where the task does not say."""
        if self.grading is not None and metric == self.grading.name:
            return True
        known: bool | None = self.library.higher_is_better().get(metric)
        return known

    @cached_property
    def config(self) -> dict[str, Any]:
        """The task's config, as plain values; functions are their source."""
        values = plain_config(self.library.dump_config())
        values.get("metadata", {}).pop("config_source", None)
        return values

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of all that the answers and numbers depend on, but the model: config, files
        of functions, documents, few-shot examples, seed, the library's version. Where the data lie
        is not in it.
        """
        from lm_eval import __version__

        config = {key: value for key, value in self.config.items() if key not in _PLACES}
        examples = getattr(getattr(self.library, "sampler", None), "df", [])
        texts = [digest(self.document(place)) for place in range(len(self))]
        drawn = [digest(each) for each in examples] if self.num_fewshot else []
        values = {
            "library": __version__,
            "config": config,
            "code": sorted(fingerprint_file(file) for file in self._code()),
            "documents": [texts, self.ids, self.clusters],
            "examples": [drawn, self.num_fewshot],
            "chat": [self.chat.wanted, self.chat.system, self.chat.multiturn],
            "split": [self.split, self.limit, self.seed],
        }
        return fingerprint_work(values, "evaluate")

    def requests(
        self, first: int, last: int, chat_template: ChatTemplate | None = None
    ) -> list[Request]:
        """What is asked about the documents from `first` up to, not including, `last`. They are the
        same whichever ranges are asked for, in which order.

        Args:
            chat_template: turns messages into a text; required where the task wants a chat.

        Raises:
            InputError: a template of the task that cannot be filled in, too few examples, settings
                of generation that no engine has.
        """
        assert 0 <= first <= last <= len(self)
        if self.chat.wanted and chat_template is None:
            raise InputError(f"task {self.name}: needs a chat template, and there is none")
        found: list[Request] = []
        place, start, self._drawn = first, self._start(first), None
        try:
            for place in range(start, first):
                self._context(place, None)  # draws the examples
            for place in range(first, last):
                instances = self._instances(place, chat_template if self.chat.wanted else None)
                for number, instance in enumerate(instances):
                    found += self._asked(place, number, instance)
        except FAILURES as error:
            raise self._failed(place, error) from None
        self._drawn = last
        return found

    def score(self, first: int, last: int, answers: Sequence[Answer]) -> list[Score]:
        """What the answers to the requests of a range of documents are worth: a value for each
        filter and document, in the order of filters.

        Raises:
            InputError: a metric that fails, or whose items are no plain values.
        """
        instances = self._answered(first, last, answers)
        for each in self.library._filters:
            try:
                each.apply([instance for _, instance in instances])
            except FAILURES as error:
                raise self._failed(first, error) from None
        by_document = {
            place: [instance for _, instance in group]
            for place, group in groupby(instances, key=lambda pair: pair[0])
        }
        names = list(instances[0][1].filtered_resps) if instances else []
        return [
            self._scored(place, name, [each.filtered_resps[name] for each in own])
            for name in names
            for place, own in by_document.items()
        ]

    def aggregate(self, scores: Iterable[Score]) -> dict[str, Metric]:
        """The task's numbers by "METRIC,FILTER", by its own aggregation.

        Raises:
            InputError: an aggregation that fails, or is not known.
        """
        items: dict[tuple[str, str], list[Any]] = {}
        for score in scores:
            for metric, item in score.metrics.items():
                items.setdefault((metric, score.filter), []).append(item)
        return {
            f"{metric},{name}": self._aggregated(metric, each, {metric for metric, _ in items})
            for (metric, name), each in items.items()
        }

    @cached_property
    def grading(self) -> Grading | None:
        """The grader that `metadata.grader` names, if it does."""
        return Grading.of(self.library, self.name)

    def _code(self) -> set[str]:
        """The files of the functions that the task names, and of its class."""
        found: list[Any] = [
            type(self.library),
            *callables(self.library.config.to_dict(keep_callable=True)),
        ]
        files = (inspect.getsourcefile(each) for each in found)
        return {file for file in files if file is not None}

    def _start(self, first: int) -> int:
        """The document from which on examples must be drawn before document `first`: the library
        draws them from one generator, one document after the other.
        """
        start = self._drawn
        if start is None or start > first:
            self.library.set_fewshot_seed(seed=self.seed)
            start = 0
        return start if self.num_fewshot else first

    def _context(self, place: int, chat_template: ChatTemplate | None) -> Any:
        """The library's prompt for a document; draws its examples."""
        document = self.document(place)
        return self.library.fewshot_context(
            document,
            num_fewshot=self.num_fewshot,
            system_instruction=self.chat.system,
            apply_chat_template=chat_template is not None,
            fewshot_as_multiturn=chat_template is not None and self.chat.multiturn,
            chat_template=chat_template,
            gen_prefix=self.library.doc_to_prefix(document),
        )

    def _instances(self, place: int, chat_template: ChatTemplate | None) -> "list[Instance]":
        """The library's requests for a document."""
        context = self._context(place, chat_template)
        found = self.library.construct_requests(
            doc=self.document(place),
            ctx=context,
            metadata=(self.name, self.ids[place], self.library.config.repeats),
            apply_chat_template=chat_template is not None,
            chat_template=chat_template,
        )
        # A document may have requests of several kinds with one number; then their order counts.
        return sorted(found, key=lambda each: each.idx) if isinstance(found, list) else [found]

    def _asked(self, place: int, number: int, instance: "Instance") -> Iterator[Request]:
        """A request of the library, once for each draw."""
        kind = _KINDS[instance.request_type]
        context, *rest = instance.args if kind != "rolling" else ("", *instance.args)
        sampling = sampling_of(self.name, rest[0]) if kind == "generate" else None
        for draw in range(instance.repeats or 1):
            yield Request(
                document=place,
                number=number,
                draw=draw,
                kind=kind,
                context=context,
                continuation="" if kind == "generate" else rest[0],
                sampling=sampling,
                seed=answer_seed(self.seed, self.name, f"{self.ids[place]}-{number}", draw),
            )

    def _answered(
        self, first: int, last: int, answers: Sequence[Answer]
    ) -> "list[tuple[int, Instance]]":
        """The library's requests with the answers, without their prompts, by their documents."""
        from lm_eval.api.instance import Instance

        ordered = sorted(answers, key=lambda each: (each.document, each.number, each.draw))
        found = []
        for (place, number), group in groupby(ordered, key=lambda a: (a.document, a.number)):
            instance = Instance(
                request_type=self.output_type,
                doc=dict(self.document(place)),
                arguments=(),
                idx=number,
                metadata=(self.name, self.ids[place], self.library.config.repeats),
            )
            instance.resps = [self._response(each) for each in group]
            found.append((place, instance))
        places = {place for place, _ in found}
        assert places == set(range(first, last)), "answers to all requests of the range"
        return found

    def _response(self, answer: Answer) -> Any:
        """An answer as the library's models give it."""
        if answer.text is not None:
            return answer.text
        if self.output_type == "loglikelihood_rolling":
            return answer.value
        return answer.value, answer.is_greedy

    def _scored(self, place: int, name: str, responses: list[Any]) -> Score:
        """The metrics of a document's answers, filtered by the filter of a name."""
        document = dict(self.document(place))
        kept = plain(responses)  # as they were: a metric may change them
        try:
            own = self.grading
            found = {} if own and own.alone else self.library.process_results(document, responses)
            if own:
                found = found | own.graded(self.library.doc_to_target(document), responses)
            metrics = {metric: plain(value) for metric, value in found.items()}
            return Score(place, name, metrics, kept)
        except InputError:
            raise
        except FAILURES as error:
            raise self._failed(place, error) from None

    def _aggregated(self, metric: str, items: list[Any], scored: set[str]) -> Metric:
        """One metric's number over all documents; `scored` are the names of all metrics."""
        from lm_eval.api.metrics import mean

        known = self.library.aggregation()
        graded = self.grading is not None and metric == self.grading.name
        function = mean if graded else known.get(metric)
        if function is None:
            # The library takes the mean, unless a function gave several names: then its own.
            functions = getattr(self.library, "_metric_fn_list", {})
            others = {known.get(n) for n, each in functions.items() if each and n not in scored}
            if others - {mean, None}:
                raise InputError(f"task {self.name}: metric {metric}: has no aggregation")
            function = mean
        try:
            value = float(function(items))
        except FAILURES as error:
            raise InputError(f"task {self.name}: metric {metric}: {first_line(error)}") from None
        better = self.higher_is_better(metric)
        return Metric(value, len(items), function is mean, better)

    def _failed(self, place: int, error: BaseException) -> InputError:
        """The error for a document that the task's config does not fit."""
        if isinstance(error, InputError):
            return error
        return InputError(f"task {self.name}: document {self.ids[place]}: {first_line(error)}")
