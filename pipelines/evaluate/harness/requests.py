"""What a task asks an engine, and the answers: plain values, that any store can hold.

The settings of generation are the library's, read as its own model of transformers reads them, but
only what a task says acts: no setting of a checkpoint's `generation_config.json` does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from pipelines.engines import Engine, Sampling, rolling_log_likelihoods
from pipelines.errors import InputError

Kind = Literal["generate", "log_likelihood", "rolling"]
LongPrompts = Literal["cut", "refuse"]
# Settings that mean the same under several names; the first one given counts.
_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_MOST_TOKENS = 256
_NUMBERS = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_OF_SAMPLING = ("top_p", "top_k")


@dataclass(frozen=True, slots=True)
class Request:
    """One question to an engine.

    Attributes:
        document: its place in the task's documents.
        number: its place among the questions about the document, as one for each choice.
        draw: the number of the answer, where several are drawn to one question.
        context: the prompt; the empty text where a whole text is scored.
        continuation: what is scored after the context; the whole text for "rolling".
        sampling: how the answer to a prompt is drawn.
        seed: of the answer.
    """

    document: int
    number: int
    draw: int
    kind: Kind
    context: str
    continuation: str = ""
    sampling: Sampling | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's answer to one request.

    Attributes:
        text: generated; None for scores.
        finish: "stop" or "length" of a generated text.
        value: log-likelihood in nats; None for texts.
        is_greedy: whether greedy decoding would have given just what was scored.
        num_tokens: generated or scored.
        num_cut: tokens at the prompt's beginning that did not fit and were left out.
    """

    document: int
    number: int
    draw: int
    text: str | None = None
    finish: str | None = None
    value: float | None = None
    is_greedy: bool | None = None
    num_tokens: int = 0
    num_cut: int = 0


def sampling_of(task: str, settings: Mapping[str, Any]) -> Sampling:
    """A task's `generation_kwargs` as an engine's settings.

    Args:
        task: its name, for messages.

    Raises:
        InputError: a setting that no engine has, or a value out of range.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    given = [left.pop(name, None) for name in _MOST_TOKENS]
    most = next((each for each in given if each is not None), _DEFAULT_MOST_TOKENS)
    is_drawn = left.pop("do_sample", None)
    temperature = left.pop("temperature", None)
    if is_drawn and temperature is None:
        temperature = 1.0
    temperature = 0.0 if is_drawn is False else float(temperature or 0.0)
    if is_drawn and temperature == 0:
        raise InputError(f"task {task}: generation_kwargs: do_sample needs a temperature above 0")
    values: dict[str, Any] = {name: float(left.pop(name)) for name in _NUMBERS if name in left}
    drawn = {name: left.pop(name) for name in _OF_SAMPLING if left.get(name) is not None}
    if temperature > 0:  # greedy decoding ignores the others, in the library too
        values |= {"top_p": float(drawn.get("top_p", 1)), "top_k": int(drawn.get("top_k", 0))}
    left.pop("use_cache", None)
    if left:
        known = ("until", *_MOST_TOKENS, "do_sample", "temperature", *_OF_SAMPLING, *_NUMBERS)
        raise InputError(
            f"task {task}: generation_kwargs: unknown setting {next(iter(left))!r}; allowed: "
            f"{', '.join(known)}"
        )
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    try:
        return Sampling(temperature=temperature, stop=stop, max_tokens=int(most), **values)
    except InputError as error:
        raise InputError(f"task {task}: generation_kwargs: {error}") from None


def answered(
    engine: Engine, requests: Sequence[Request], task: str, long_prompts: LongPrompts = "cut"
) -> list[Answer]:
    """An engine's answers to requests, in their order.

    Args:
        task: its name, for messages.
        long_prompts: what happens to prompts that do not fit into the engine's context, with
            their answer's most tokens: `cut` leaves out their beginnings, as the library does;
            `refuse` is an error.

    Raises:
        InputError: prompts that do not fit, in ways that the policy does not mend.
    """
    order = sorted(range(len(requests)), key=lambda place: _alike(requests[place]))
    found: dict[int, Answer] = {}
    for _, group in groupby(order, key=lambda place: _alike(requests[place])):
        places = list(group)
        alike = [requests[place] for place in places]
        if alike[0].kind == "generate":
            answers = _generated(engine, alike, task, long_prompts)
        elif alike[0].kind == "log_likelihood":
            answers = _scored(engine, alike, task, long_prompts)
        else:
            answers = _rolled(engine, alike)
        found.update(zip(places, answers, strict=True))
    return [found[place] for place in range(len(requests))]


def _alike(request: Request) -> tuple[str, str]:
    """Equal for requests that an engine may answer together."""
    return request.kind, repr(request.sampling)


def _generated(
    engine: Engine, requests: Sequence[Request], task: str, long_prompts: LongPrompts
) -> list[Answer]:
    """Answers to prompts, which are alike in their settings."""
    sampling = requests[0].sampling
    assert sampling is not None
    room = engine.context - sampling.max_tokens
    if room < 1:
        raise InputError(
            f"task {task}: generation_kwargs: max_gen_toks: found {sampling.max_tokens}; allowed: "
            f"up to {engine.context - 1}, as the model's context has {engine.context} tokens"
        )
    prompts = [engine.encode(request.context) for request in requests]
    cut = [max(0, len(prompt) - room) for prompt in prompts]
    _check_long(task, requests, prompts, cut, room, long_prompts)
    kept = [prompt[num:] for prompt, num in zip(prompts, cut, strict=True)]
    completions = engine.generate(kept, sampling, [request.seed for request in requests])
    return [
        Answer(
            *_key(request),
            text=completion.text,
            finish=completion.finish,
            num_tokens=len(completion.tokens),
            num_cut=num,
        )
        for request, completion, num in zip(requests, completions, cut, strict=True)
    ]


def _scored(
    engine: Engine, requests: Sequence[Request], task: str, long_prompts: LongPrompts
) -> list[Answer]:
    """Log-likelihoods of continuations. Where both do not fit, the context's beginning goes."""
    pairs = [engine.text.pair(each.context, each.continuation) for each in requests]
    room = engine.most_scored
    for request, (_, last) in zip(requests, pairs, strict=True):
        if not last or len(last) >= room:
            raise InputError(
                f"task {task}: document {request.document}: a continuation has {len(last)} tokens; "
                f"allowed: 1 to {room - 1}"
            )
    cut = [max(0, len(first) + len(last) - room) for first, last in pairs]
    whole = [first + last for first, last in pairs]
    _check_long(task, requests, whole, cut, room, long_prompts)
    kept = [first[num:] for (first, _), num in zip(pairs, cut, strict=True)]
    scores = engine.log_likelihoods(kept, [last for _, last in pairs])
    return [
        Answer(
            *_key(request),
            value=score.value,
            is_greedy=score.is_greedy,
            num_tokens=score.num_tokens,
            num_cut=num,
        )
        for request, score, num in zip(requests, scores, cut, strict=True)
    ]


def _rolled(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Log-likelihoods of whole texts, in windows where they are long."""
    scores = rolling_log_likelihoods(engine, [request.continuation for request in requests])
    return [
        Answer(
            *_key(request),
            value=score.value,
            is_greedy=score.is_greedy,
            num_tokens=score.num_tokens,
        )
        for request, score in zip(requests, scores, strict=True)
    ]


def _key(request: Request) -> tuple[int, int, int]:
    return request.document, request.number, request.draw


def _check_long(
    task: str,
    requests: Sequence[Request],
    prompts: Sequence[Sequence[int]],
    cut: Sequence[int],
    room: int,
    long_prompts: LongPrompts,
) -> None:
    """Raise InputError, which counts them, for prompts that do not fit, unless they may be cut."""
    long = [place for place, num in enumerate(cut) if num]
    if long and long_prompts == "refuse":
        raise InputError(
            f"task {task}: {len(long)} of {len(prompts)} prompts are longer than the context: that "
            f"of document {requests[long[0]].document} has {len(prompts[long[0]])} tokens; "
            f"allowed: up to {room}, or long_prompts: cut"
        )
