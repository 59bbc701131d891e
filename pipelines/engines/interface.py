"""What every engine does: answer prompts, score continuations and conversations, change weights.

An engine holds one model. Evaluation, search and serving know only these names; which library
computes is a field of the config (`pipelines.engines.config`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipelines.errors import InputError

if TYPE_CHECKING:
    from pipelines.engines.text import Text
    from pipelines.engines.weights import Weights
    from pipelines.merge.plan import MergePlan

Message = Mapping[str, str]  # role and content
Prompt = str | Sequence[Message] | Sequence[int]  # a text, messages for the chat template, tokens
Conversation = Prompt  # the same, with the answer in it


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn; the default is greedy decoding without log-probabilities.

    Penalties change the logits first (repetition on the tokens of prompt and answer; presence and
    frequency on those of the answer), then the temperature divides them, then the `top_k` best
    remain, then the best whose probabilities sum to `top_p`.

    Attributes:
        temperature: 0 is greedy decoding.
        top_k: 0 keeps all tokens.
        stop: texts that end an answer; it is cut before the first of them.
        max_tokens: of an answer; it ends earlier where the model's context is full.
        top_logprobs: give the log-probabilities of this many best tokens at each position, and of
            the chosen one; of the model itself, before penalties and temperature. None: none.

    Raises:
        InputError: a value out of range, or one that greedy decoding ignores.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        top = self.top_logprobs
        for name, found, fits, allowed in (
            ("temperature", self.temperature, 0 <= self.temperature < 100, "0 to 100"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 2, "-2 to 2"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 2, "±2"),
            ("stop", self.stop, all(self.stop), "texts that are not empty"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            ("top_logprobs", top, top is None or 0 < top <= 20, "1 to 20"),
        ):
            if not fits:
                raise InputError(f"{name}: found {found}; allowed: {allowed}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            name = "top_p" if self.top_p < 1 else "top_k"
            raise InputError(f"{name}: has no effect at temperature 0; allowed: a temperature > 0")

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer.

    Attributes:
        text: without special tokens and without the text that stopped it.
        tokens: all generated tokens, with the one that ended the answer.
        finish: "stop" where the model or a stop text ended it, "length" where the room did.
        logprobs: for each token, token -> log-probability of the best ones and of itself.
        weights: the digest of the weights that made it.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    logprobs: tuple[Mapping[int, float], ...] | None
    weights: str


@dataclass(frozen=True, slots=True)
class Piece:
    """What one more step, or a few, have brought to an answer.

    Attributes:
        logprobs: as in `Completion`, for each of these tokens.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[Mapping[int, float], ...] | None = None


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """A continuation's sum of log-probabilities, whether greedy decoding would give just it, and
    how many tokens it has.
    """

    value: float
    is_greedy: bool
    num_tokens: int


class Engine(Protocol):
    """One model that is ready to answer. Engines for rewards refuse to generate, and the other way
    round; one whose swap failed refuses everything until a swap succeeds.
    """

    @property
    def weights(self) -> str:
        """The digest of the weights that are in it, as in `poise.json`."""

    @property
    def context(self) -> int:
        """The most tokens of a prompt with its answer."""

    @property
    def most_scored(self) -> int:
        """The most tokens of a context with its continuation in `log_likelihoods`."""

    @property
    def text(self) -> "Text":
        """Its tokenizer, with the chat template and what ends an answer."""

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt as `generate` reads it: a text, messages in the chat template with
        the beginning of an answer, or tokens, as they are.

        Raises:
            InputError: messages for a model without chat template.
        """

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """The answers to the prompts, in their order. An answer depends on its own prompt and seed
        alone, not on its neighbours or their order.

        Args:
            seeds: one for each prompt, from `answer_seed`; required where the temperature is not 0.

        Raises:
            InputError: prompts that do not fit into the context, no chat template, no seeds.
        """

    def log_likelihoods(
        self, contexts: Sequence[str | Sequence[int]], continuations: Sequence[str | Sequence[int]]
    ) -> list[LogLikelihood]:
        """Log-likelihoods of continuations after their contexts, cut into tokens as by
        lm-evaluation-harness: together, blanks at a context's end count as the continuation's, and
        an empty context is the token that begins texts.

        Raises:
            InputError: a pair that does not fit into the context, an empty continuation.
        """

    def rewards(self, conversations: Sequence[Conversation]) -> list[float]:
        """Raw scores of whole conversations by a sequence classification model: those of its one
        label, or of the config's `head`. Tokens are scored as they are.

        Raises:
            InputError: conversations that do not fit into the context, or no chat template.
        """

    def swap(self, source: "str | Path | MergePlan | Weights") -> str:
        """Put other weights of the same names and shapes into the running engine; returns their
        digest. Nothing is written. What can be checked without reading the weights is checked
        before anything is touched; after a failure on the way the engine refuses to answer.

        Args:
            source: a checkpoint's folder, or a planned merge, whose tensors are computed here.

        Raises:
            InputError: other names, shapes, architecture, tokens; NaN or Inf in the weights.
        """

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""


def answer_seed(seed: int, task: str, sample: str | int, draw: int = 0) -> int:
    """The seed of one answer: a hash, in [0, 2^63), of what the answer is, not of when it is drawn.

    Args:
        seed: of the run.
        task: the task's name.
        sample: the prompt's name or place in its task.
        draw: number of the answer, where several are drawn to one prompt.
    """
    text = f"{seed}|{task}|{sample}|{draw}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def check_seeds(prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int] | None) -> None:
    """Raise InputError where sampled answers have no seed each."""
    if seeds is None and sampling.temperature > 0:
        raise InputError("seeds: required where the temperature is not 0, not given")
    if seeds is not None and len(seeds) != len(prompts):
        raise InputError(f"seeds: found {len(seeds)}; allowed: {len(prompts)}, one for each prompt")
