"""The engine on transformers: any model that it knows, on a CPU or one GPU."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.engines.config import EngineConfig, computing_dtype, torch_device
from pipelines.engines.interface import (
    Completion,
    Conversation,
    LogLikelihood,
    Piece,
    Prompt,
    Sampling,
    check_seeds,
)
from pipelines.engines.models import check_kind, context_of, head_of
from pipelines.engines.places import Places
from pipelines.engines.sampling import Sampler, StopTexts, Watched
from pipelines.engines.state import EngineState
from pipelines.engines.text import Text
from pipelines.engines.weights import Inspection, Weights, weights_of
from pipelines.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipelines.merge.plan import MergePlan


class TransformersEngine:
    """An `Engine`: a model of transformers with its tokenizer.

    The model is made from the stream of its weights, at the start as at a swap, so `weights` is
    the digest of just what is in it.

    Args:
        source: a Hugging Face checkpoint's folder, or a planned merge.

    Raises:
        InputError: nothing that this engine can run.
    """

    def __init__(
        self, source: "str | Path | MergePlan | Weights", config: EngineConfig | None = None
    ) -> None:
        self.config = config or EngineConfig()
        weights = weights_of(source)
        check_kind(weights, self.config)
        self._device = torch_device(self.config)
        self._text = Text(weights, context_of(weights.config, self.config))
        self._state = EngineState(weights, self.config, self._device)
        self._model: PreTrainedModel | None = None
        self._places: Places | None = None
        self._load(weights)

    @property
    def weights(self) -> str:
        """As `Engine.weights`."""
        return self._state.digest

    @property
    def context(self) -> int:
        """As `Engine.context`."""
        return self._text.context

    @property
    def most_scored(self) -> int:
        """The last token is predicted, not read."""
        return self._text.context + 1

    @property
    def text(self) -> Text:
        """The tokenizer with what belongs to it."""
        return self._text

    def encode(self, prompt: Prompt) -> list[int]:
        """As `Engine.encode`."""
        return self._text.encode(prompt)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        progress: Callable[[int], Any] = lambda done: None,
        watch: Callable[[int, Piece], bool] | None = None,
    ) -> list[Completion]:
        """As `Engine.generate`; prompts of similar length share a batch, with little padding.

        Args:
            progress: called with the number of answers of each finished batch.
            watch: called with a prompt's place and each new token of its answer; the answer ends
                where it returns False.
        """
        self._state.check("generate")
        check_seeds(prompts, sampling, seeds)
        encoded = [self._text.encode(prompt) for prompt in prompts]
        self._text.check_room([len(each) for each in encoded], self.context - 1, "prompts")
        answers: dict[int, Completion] = {}
        for limit, batch in self._batches(encoded, sampling.max_tokens):
            own = None if seeds is None else [seeds[place] for place in batch]
            seen = None if watch is None else partial(_watched, watch, batch)
            found = self._answers([encoded[place] for place in batch], sampling, own, limit, seen)
            answers.update(zip(batch, found, strict=True))
            progress(len(batch))
        return [answers[place] for place in range(len(prompts))]

    def log_likelihoods(
        self, contexts: Sequence[str | Sequence[int]], continuations: Sequence[str | Sequence[int]]
    ) -> list[LogLikelihood]:
        """As `Engine.log_likelihoods`."""
        self._state.check("generate")
        pairs = [self._text.pair(*each) for each in zip(contexts, continuations, strict=True)]
        self._text.check_room([len(last) for _, last in pairs], self.context, "continuations")
        lengths = [len(first) + len(last) for first, last in pairs]
        self._text.check_room(lengths, self.most_scored, "contexts with their continuations")
        self._text.check_room([len(first) for first, _ in pairs], self.context, "contexts")
        order = sorted(range(len(pairs)), key=lambda place: (-lengths[place], place))
        found: dict[int, LogLikelihood] = {}
        for first in range(0, len(order), self.config.batch_size):
            batch = order[first : first + self.config.batch_size]
            found.update(zip(batch, self._scored([pairs[p] for p in batch]), strict=True))
        return [found[place] for place in range(len(pairs))]

    @torch.inference_mode()
    def scores(self, conversations: Sequence[Conversation]) -> list[list[float]]:
        """The raw scores of all labels, for each conversation. transformers' classes look for the
        last token that is no padding, so without a padding token in config.json conversations are
        scored one by one.
        """
        self._state.check("reward")
        model = self._running
        pad = model.config.get_text_config().pad_token_id
        encoded = [self._text.conversation(each) for each in conversations]
        self._text.check_room([len(each) for each in encoded], self.context, "conversations")
        order = sorted(range(len(encoded)), key=lambda place: (-len(encoded[place]), place))
        size = 1 if pad is None else self.config.batch_size
        found: dict[int, list[float]] = {}
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            ids, mask = self._padded([encoded[place] for place in batch], pad or 0)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            found.update(zip(batch, logits.to(torch.float32).tolist(), strict=True))
        return [found[place] for place in range(len(encoded))]

    def rewards(self, conversations: Sequence[Conversation]) -> list[float]:
        """As `Engine.rewards`."""
        self._state.check("reward")
        head = head_of(self._running.config.to_dict(), self.config.head)
        return [row[head] for row in self.scores(conversations)]

    def swap(self, source: "str | Path | MergePlan | Weights") -> str:
        """As `Engine.swap`. Where the model holds the checkpoint's tensors as they are, new values
        are copied over the old ones; else the old model is freed before the new one is made.
        """
        weights = weights_of(source)
        self._state.check_swap(weights)
        text = self._text.after_swap(weights)
        if self._places is not None and self._places.fit(weights):
            self._copy(weights, self._places)
        else:
            self._load(weights)
        self._text = text
        return self.weights

    def close(self) -> None:
        """As `Engine.close`."""
        self._model = self._places = None
        self._state.lost("it is closed")

    @property
    def _running(self) -> "PreTrainedModel":
        assert self._model is not None
        return self._model

    def _load(self, weights: Weights) -> None:
        """Make the model from the stream of its weights."""
        with self._changing(weights) as stream:
            self._model = self._places = None  # frees the old weights before the new ones are read
            dtype = computing_dtype(self.config, self._state.stored, self._device)
            tensors = dict(stream)
            self._model = _made(weights, tensors, dtype, self.config.kind)
            self._model.to(self._device)  # type: ignore[arg-type] # wrapped by transformers
            self._places = Places.of(self._model, tensors)

    @torch.no_grad()
    def _copy(self, weights: Weights, places: Places) -> None:
        """Copy the stream of other weights into the model."""
        with self._changing(weights) as stream:
            for name, tensor in stream:
                places.tensors[name].copy_(tensor)

    @contextmanager
    def _changing(self, weights: Weights) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """In the block the model takes the stream of weights, and has none of them if it fails."""
        self._state.lost("its weights are being changed")
        inspection = Inspection(weights)
        try:
            yield inspection.stream()
        except BaseException as error:
            self._model = self._places = None
            self._state.lost(f"a swap failed ({_first_line(error)})")
            raise
        self._state.loaded(inspection.digest)

    def _batches(
        self, encoded: Sequence[Sequence[int]], max_tokens: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Batches of prompts, shortest first, each with the most tokens of its answers: less than
        `max_tokens` only where the context is full, and then equal in the batch.
        """

        def limit(place: int) -> int:
            return min(max_tokens, self.context - len(encoded[place]))

        order = sorted(range(len(encoded)), key=lambda place: (len(encoded[place]), place))
        for room, group in groupby(order, limit):
            places = list(group)
            for first in range(0, len(places), self.config.batch_size):
                yield room, places[first : first + self.config.batch_size]

    @torch.inference_mode()
    def _answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        limit: int,
        watch: Callable[[int, Piece], bool] | None = None,
    ) -> list[Completion]:
        """The answers to one batch."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        pad = self._text.tokenizer.pad_token_id or 0
        ids, mask = self._padded(prompts, pad, left=True)
        width = ids.shape[1]
        sampler = Sampler(sampling, prompts, width, seeds)
        stops = StopTexts(self._text, sampling.stop, width, len(prompts)) if sampling.stop else None
        ends = self._text.ends
        watched = None if watch is None else Watched(watch, sampler, ends, width, len(prompts))
        criteria = StoppingCriteriaList([each for each in (stops, watched) if each is not None])
        # transformers' types do not say which models can generate.
        output = self._running.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=limit,
                pad_token_id=pad,
                eos_token_id=sorted(self._text.ends) or None,
            ),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=criteria or None,
        )
        lengths = [None] * len(prompts) if stops is None else stops.lengths
        return [
            self._completion(row[:length], sampling, sampler.logprobs[place])
            for place, (row, length) in enumerate(
                zip(output[:, width:].tolist(), lengths, strict=True)
            )
        ]

    def _completion(
        self, row: list[int], sampling: Sampling, logprobs: list[dict[int, float]]
    ) -> Completion:
        """One row of the output, whose padding begins after the token that ended it."""
        end = next((place for place, token in enumerate(row) if token in self._text.ends), len(row))
        tokens = row[: end + 1]
        text, finish = self._text.answer(tokens, sampling.stop)
        wanted = sampling.top_logprobs is not None
        return Completion(
            text=text,
            tokens=tuple(tokens),
            finish=finish,
            logprobs=tuple(logprobs[: len(tokens)]) if wanted else None,
            weights=self.weights,
        )

    @torch.inference_mode()
    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[LogLikelihood]:
        """The log-likelihoods of one batch. The last token of each row is not read; logits are made
        only where a continuation is predicted.
        """
        ids, mask = self._padded([(first + last)[:-1] for first, last in pairs], 0)
        start = min(len(first) for first, _ in pairs) - 1
        logits, start = self._logits(ids, mask, start)
        found = []
        for row, (first, last) in zip(logits, pairs, strict=True):
            place = len(first) - 1 - start
            values = row[place : place + len(last)].log_softmax(-1, dtype=torch.float32)
            wanted = torch.tensor(last, device=values.device)
            chosen = values.gather(1, wanted[:, None])
            is_greedy = bool((values.argmax(-1) == wanted).all())
            found.append(LogLikelihood(float(chosen.sum()), is_greedy, len(last)))
        return found

    def _logits(self, ids: Tensor, mask: Tensor, start: int) -> tuple[Tensor, int]:
        """The logits from position `start` on, or all where the model cannot leave some out, with
        their first position.
        """
        model = self._running
        known = inspect.signature(model.forward).parameters
        arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
        if "logits_to_keep" not in known:
            start = 0
        else:
            arguments["logits_to_keep"] = ids.shape[1] - start
        return model(input_ids=ids, attention_mask=mask, **arguments).logits, start

    def _padded(
        self, rows: Sequence[Sequence[int]], pad: int, left: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rows as one matrix and its mask: (rows, longest) int64 each."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            span = slice(width - len(row), width) if left else slice(0, len(row))
            ids[place, span] = torch.tensor(row)
            mask[place, span] = 1
        return ids.to(self._device), mask.to(self._device)


def _watched(
    watch: Callable[[int, Piece], bool], batch: Sequence[int], row: int, piece: Piece
) -> bool:
    """Tell of a batch's row by its prompt's place."""
    return watch(batch[row], piece)


def _made(
    weights: Weights, tensors: dict[str, Tensor], dtype: torch.dtype, kind: str
) -> "PreTrainedModel":
    """A model of transformers with these tensors.

    Raises:
        InputError: a class that transformers does not know, or tensors that are not the class's.
    """
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        GenerationConfig,
    )

    auto: Any = AutoModelForCausalLM if kind == "generate" else AutoModelForSequenceClassification
    try:
        settings = CONFIG_MAPPING[weights.config["model_type"]].from_dict(weights.config)
        made, found = auto._model_mapping[type(settings)].from_pretrained(
            None, config=settings, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"model {weights.name}: does not load: {_first_line(error)}") from None
    for problem in ("missing", "mismatched"):
        names = sorted(map(str, found[f"{problem}_keys"]))
        if names:
            raise InputError(
                f"model {weights.name}: does not load: {names[0]} is {problem}; allowed: all "
                "tensors of its class"
            )
    made.generation_config = GenerationConfig()  # a checkpoint's own would act unseen
    model: PreTrainedModel = made.eval()
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
