"""`poise chat`: talk to a model in the terminal."""

import sys
from pathlib import Path

from pipelines.checkpoints.hub import folder_of
from pipelines.engines import Sampling
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.errors import InputError
from ray_jobs.session import quiet_environment

MAX_NEW_TOKENS = 256


def run_chat(path: Path) -> None:
    """Answer each line of stdin with one or more lines on stdout, until the end of stdin.

    Answers are greedy, as in `poise evaluate`. Every line is a separate conversation: small models
    are trained on single turns, and so an answer depends only on its line. Only a terminal gets a
    prompt, on stderr.

    Raises:
        InputError: `path` is no checkpoint that loads, or its tokenizer has no chat template.
    """
    quiet_environment()
    engine = TransformersEngine(folder_of(path))
    if not engine.text.tokenizer.chat_template:
        raise InputError(f"model {path}: its tokenizer has no chat template")
    at_terminal = sys.stdin.isatty()
    while line := _read_line(at_terminal):
        if line.strip():
            _answer(engine, line.strip())
    if at_terminal:
        print(file=sys.stderr)


def _read_line(at_terminal: bool) -> str:
    """The next line with its line break; empty at the end of the input."""
    if at_terminal:
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def _answer(engine: TransformersEngine, question: str) -> None:
    """Print the greedy answer to one question, within the model's maximum length."""
    messages = [{"role": "user", "content": question}]
    num_tokens = len(engine.encode(messages))
    if num_tokens >= engine.context:
        print(f"too long: {num_tokens} tokens; the model reads {engine.context}", file=sys.stderr)
        return
    [answer] = engine.generate([messages], Sampling(max_tokens=MAX_NEW_TOKENS))
    print(answer.text.strip(), flush=True)
