"""Pre-train the tiny world's base model from scratch, in one process, into an ordinary checkpoint.

`pipelines.train` does SFT and preference training.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.commit import staged_directory
from pipelines.progress import Progress
from pipelines.tiny_world.sizes import SIZES, Size

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

WARM_UP_SHARE = 0.03
NUM_PARTS = 2  # of a batch, one thread each; fixed, so that sums are the same on every machine
HEAD_SIZE = 32  # the smallest that vLLM's CPU attention supports


def train_base(world: str | Path, out: str | Path, size: str, seed: int) -> Path:
    """Pre-train a Llama on the world's packed text; save it with its tokenizer."""
    import pyarrow.parquet
    from transformers import AutoTokenizer, LlamaForCausalLM

    settings = SIZES[size]
    tokenizer = AutoTokenizer.from_pretrained(Path(world) / "tokenizer", local_files_only=True)
    texts = pyarrow.parquet.read_table(Path(world) / "data" / "pretrain.parquet")["text"]
    rows = _packed(tokenizer, texts.to_pylist(), settings.base_length)
    with _one_thread(), staged_directory(out) as folder:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_architecture(settings, tokenizer))
        order = np.random.default_rng([seed, 1])

        def batch() -> Tensor:
            return rows[torch.from_numpy(order.integers(len(rows), size=settings.base_batch))]

        _train(model, batch, settings.base_steps, settings.base_learning_rate)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(out)


def _architecture(size: Size, tokenizer: "PreTrainedTokenizerBase"):
    """A Llama of the given size; embeddings are tied, as is usual for small models."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.hidden_size * 8 // 3,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // HEAD_SIZE,
        num_key_value_heads=size.hidden_size // HEAD_SIZE,
        max_position_embeddings=256,
        # At this width the usual 0.02 is too small: attention learns nothing for half the steps.
        initializer_range=size.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _packed(tokenizer: "PreTrainedTokenizerBase", texts: list[str], length: int) -> Tensor:
    """Documents between begin and end tokens, one after another, cut into rows: (rows, length)."""
    ids: list[int] = []
    for document in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *document, tokenizer.eos_token_id]
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).view(rows, length)


def _train(
    model: "LlamaForCausalLM", batch: Callable[[], Tensor], num_steps: int, learning_rate: float
) -> None:
    """AdamW with a short warm-up, cosine decay to a tenth, and gradients clipped at 1."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, num_steps))
    with Progress(num_steps, "pre-training") as progress, ThreadPoolExecutor(NUM_PARTS) as pool:
        for _ in range(num_steps):
            loss = _backward(model, batch(), pool)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.advance(note=f"loss {loss:.3f}")


def _backward(model: "LlamaForCausalLM", batch: Tensor, pool: ThreadPoolExecutor) -> float:
    """Set the gradients of the mean loss over a batch's tokens, (rows, length), with one thread per
    part; returns the loss.

    torch's own threads split single operations, which are too small for that here.
    """
    num_tokens = torch.tensor(batch[:, 1:].numel())  # the first token is not predicted
    parameters = list(model.parameters())

    def part(rows: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        ids = batch[rows]
        loss = model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=num_tokens).loss
        return loss.detach(), torch.autograd.grad(loss, parameters)

    parts = [slice(first, None, NUM_PARTS) for first in range(NUM_PARTS)]
    losses, gradients = zip(*pool.map(part, parts), strict=True)
    for parameter, summands in zip(parameters, zip(*gradients, strict=True), strict=True):
        parameter.grad = torch.stack(summands).sum(0)
    return float(sum(losses))


def _factor(step: int, num_steps: int) -> float:
    """The learning rate's factor: linear warm-up, then cosine from 1 to 0.1."""
    warm_up = max(1, round(WARM_UP_SHARE * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    share = (step - warm_up) / max(1, num_steps - warm_up)
    return 0.1 + 0.45 * (1 + float(np.cos(np.pi * share)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread per operation: faster than two at this size, and with a fixed sum order."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
