"""`poise chat`: talk to a model in the terminal."""

import sys
from pathlib import Path

from pipelines.checkpoints.hub import folder_of
from pipelines.errors import InputError
from pipelines.evaluate.generate import Generator
from ray_jobs.session import quiet_environment

MAX_NEW_TOKENS = 256
_UNBOUNDED = 1_000_000


def run_chat(path: Path) -> None:
    """Answer each line of stdin with one or more lines on stdout, until the end of stdin.

    Answers are greedy, as in `poise evaluate`. Every line is a separate conversation: small models
    are trained on single turns, and so an answer depends only on its line. Only a terminal gets a
    prompt, on stderr.

    Raises:
        InputError: `path` is no checkpoint that loads, or its tokenizer has no chat template.
    """
    quiet_environment()
    generator = Generator(folder_of(path))
    if not generator.tokenizer.chat_template:
        raise InputError(f"model {path}: its tokenizer has no chat template")
    at_terminal = sys.stdin.isatty()
    while line := _read_line(at_terminal):
        if line.strip():
            _answer(generator, line.strip())
    if at_terminal:
        print(file=sys.stderr)


def _read_line(at_terminal: bool) -> str:
    """The next line with its line break; empty at the end of the input."""
    if at_terminal:
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def _answer(generator: Generator, question: str) -> None:
    """Print the greedy answer to one question, within the model's maximum length."""
    messages = [{"role": "user", "content": question}]
    positions = getattr(generator.model.config, "max_position_embeddings", _UNBOUNDED)
    num_tokens = len(generator.encode(messages))
    if num_tokens >= positions:
        print(f"too long: {num_tokens} tokens; the model reads {positions}", file=sys.stderr)
        return
    length = min(MAX_NEW_TOKENS, positions - num_tokens)
    answer = generator.complete([messages], max_new_tokens=length, batch_size=1)[0]
    print(answer.strip(), flush=True)
