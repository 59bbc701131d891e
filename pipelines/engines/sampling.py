"""Sampling inside transformers' own generation loop: an answer's randomness is its seed's alone.

transformers takes the token with the highest score. So a sampled token is made the highest by the
Gumbel-max trick: argmax(logits / temperature + noise) with noise = -ln(-ln(u)) has the softmax's
distribution. u is a function of the answer's seed, the number of its token, and the token's id
(`operators.counter_random`): neither the batch nor the order of prompts has a part in it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from operators.counter_random import WORDS, counter_key, unsigned_words
from pipelines.engines.interface import Piece, Sampling

if TYPE_CHECKING:
    from pipelines.engines.text import Text


class Sampler:
    """Chooses the tokens of one batch; a `LogitsProcessor` of transformers.

    Args:
        prompts: the tokens of each prompt, without padding.
        width: tokens of the padded prompts.
        seeds: of each answer; unused where decoding is greedy.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        width: int,
        seeds: Sequence[int] | None,
    ) -> None:
        self._sampling, self._prompts, self._width, self._seeds = sampling, prompts, width, seeds
        self._in_prompt: Tensor | None = None  # (batch, vocabulary)
        self.logprobs: list[list[dict[int, float]]] = [[] for _ in prompts]

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Scores whose highest is the next token.

        Args:
            tokens: (batch, length), padded prompts and answers so far.
            scores: (batch, vocabulary), the model's logits.
        """
        scores = scores.to(torch.float32)
        answers = tokens[:, self._width :]
        chosen = self._penalised(answers, scores) if self._sampling.has_penalties else scores
        if self._sampling.temperature > 0:
            chosen = kept(chosen / self._sampling.temperature, self._sampling)
            chosen = chosen.to(torch.float64) + self._noise(answers.shape[1], chosen)
        if self._sampling.top_logprobs is not None:
            self._record(scores, chosen.argmax(-1), self._sampling.top_logprobs)
        return chosen

    def _penalised(self, answers: Tensor, logits: Tensor) -> Tensor:
        """Logits after the penalties on tokens of prompts and answers."""
        counts = torch.zeros_like(logits)
        counts.scatter_add_(1, answers, torch.ones_like(answers, dtype=logits.dtype))
        if self._in_prompt is None:
            self._in_prompt = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in zip(self._in_prompt, self._prompts, strict=True):
                row[torch.tensor(prompt, device=row.device)] = True
        factor = self._sampling.repetition_penalty
        divided = torch.where(logits > 0, logits / factor, logits * factor)
        result = torch.where(self._in_prompt | (counts > 0), divided, logits)
        result = result - self._sampling.frequency_penalty * counts
        return result - self._sampling.presence_penalty * (counts > 0)

    def _noise(self, step: int, like: Tensor) -> Tensor:
        """Gumbel noise of each answer's token number `step`: (batch, vocabulary) float64."""
        assert self._seeds is not None
        size = like.shape[1]
        words = [unsigned_words(counter_key(s, "answer", 0, step), 0, size) for s in self._seeds]
        uniform = (np.stack(words) + 0.5) / WORDS
        return torch.from_numpy(-np.log(-np.log(uniform))).to(like.device)

    def _record(self, logits: Tensor, chosen: Tensor, count: int) -> None:
        """Keep the log-probabilities of the best tokens and of the chosen one."""
        values = logits.log_softmax(-1)
        best = values.topk(min(count, values.shape[1]), dim=-1)
        own = values.gather(1, chosen[:, None])
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for row, (ids, found), token, value in zip(
            self.logprobs, rows, chosen.tolist(), own[:, 0].tolist(), strict=True
        ):
            row.append(dict(zip(ids, found, strict=True)) | {token: value})


def kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits with -inf for the tokens that top_k and top_p leave out: (batch, vocabulary).

    top_p keeps the fewest best tokens whose probabilities sum to at least p.
    """
    if sampling.top_k > 0:
        least = logits.topk(min(sampling.top_k, logits.shape[1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        shares = ordered.softmax(-1, dtype=torch.float64)
        before = shares.cumsum(-1) - shares  # the probability of all better tokens
        left_out = (before >= sampling.top_p).scatter(1, places, before >= sampling.top_p)
        logits = logits.masked_fill(left_out, -torch.inf)
    return logits


class StopTexts:
    """Ends a row when a stop text is in its answer; a `StoppingCriteria` of transformers.

    Attributes:
        lengths: tokens of the answers that are at their end; None: not ended by a stop text.
    """

    def __init__(self, text: "Text", stop: Sequence[str], width: int, num_rows: int) -> None:
        self._decode: Callable[[Sequence[int]], str] = text.decode
        self._stop, self._width = stop, width
        self._tail = stop_tail(stop)
        self.lengths: list[int | None] = [None] * num_rows

    def __call__(self, tokens: Tensor, scores: Tensor, **unused: object) -> Tensor:
        """Which rows are at their end: (batch,) bool."""
        length = tokens.shape[1] - self._width
        tails = tokens[:, max(self._width, tokens.shape[1] - self._tail) :].tolist()
        for row, tail in enumerate(tails):
            if self.lengths[row] is None and any(s in self._decode(tail) for s in self._stop):
                self.lengths[row] = length
        ended = [each is not None for each in self.lengths]
        return torch.tensor(ended, device=tokens.device)


class Watched:
    """Tells of each new token, and ends the rows that nobody wants any more; a `StoppingCriteria`
    of transformers.

    Args:
        watch: called with a row and its new token; the row ends where it returns False.
        ends: the tokens that end an answer.
    """

    def __init__(
        self,
        watch: Callable[[int, Piece], bool],
        sampler: Sampler,
        ends: frozenset[int],
        width: int,
        num_rows: int,
    ) -> None:
        self._watch, self._sampler, self._ends, self._width = watch, sampler, ends, width
        self._goes_on = [True] * num_rows

    def __call__(self, tokens: Tensor, scores: Tensor, **unused: object) -> Tensor:
        """Which rows are at their end: (batch,) bool."""
        for row, token in enumerate(tokens[:, -1].tolist()):
            if self._goes_on[row]:
                found = self._sampler.logprobs[row]
                piece = Piece((token,), (found[-1],) if found else None)
                self._goes_on[row] = self._watch(row, piece) and token not in self._ends
        return torch.tensor([not each for each in self._goes_on], device=tokens.device)


def stopped_at(text: "Text", tokens: Sequence[int], stop: Sequence[str]) -> int | None:
    """How many of an answer's tokens bring the first stop text, as `StopTexts` counts; None: it
    has none.
    """
    tail = stop_tail(stop)
    for length in range(1, len(tokens) + 1):
        end = text.decode(tokens[max(0, length - tail) : length])
        if any(each in end for each in stop):
            return length
    return None


def stop_tail(stop: Sequence[str]) -> int:
    """In how many of the last tokens a stop text is looked for: a text of n bytes ends in at most
    the last n tokens, and special ones between them.
    """
    return 2 * max(len(each.encode()) for each in stop) + 8
