"""Slow references for the engines: one prompt at a time, in float64, straight from the formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from operators.counter_random import WORDS, counter_key, counter_words
from pipelines.engines import Sampling
from pipelines.engines.transformers_engine import TransformersEngine
from tests.tiny_models import save_tiny_llama

SIZES = {
    "hidden_size": 64,  # heads of 32, the smallest that vLLM has on the CPU
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,  # far from ties
}


def save_chatty(path: Path, seed: int, **fields: object) -> Path:
    """A tiny random Llama with varied answers, which vLLM can run too."""
    return save_tiny_llama(path, seed, **{**SIZES, **fields})


def damage(path: Path, name: str, value: float = float("nan")) -> Path:
    """Put one bad number into a checkpoint's tensor."""
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def long_prompts(num_tokens: int, count: int = 3) -> list[list[int]]:
    """Prompts that are longer than a block of vLLM's prefix cache."""
    return [[1] + [(7 * i + j * j) % 40 + 6 for j in range(num_tokens)] for i in range(count)]


def count_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on, the numbers of prompts that engines on transformers are asked, call by call."""
    counts: list[int] = []
    plain = TransformersEngine.generate

    def counting(self: TransformersEngine, prompts: Any, *rest: Any) -> Any:
        counts.append(len(prompts))
        return plain(self, prompts, *rest)

    monkeypatch.setattr(TransformersEngine, "generate", counting)
    return counts


class Reference:
    """A model of transformers without batches, caches or padding."""

    def __init__(self, path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        self.model = model.to(torch.float64).eval()

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """(length, vocabulary) float64."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0]

    def log_likelihood(self, first: list[int], last: list[int]) -> tuple[float, bool]:
        """Of `last` after `first`, and whether it is greedy."""
        values = self.logits(first + last).log_softmax(-1)
        rows = range(len(first) - 1, len(first) + len(last) - 1)
        total = sum(float(values[row, token]) for row, token in zip(rows, last, strict=True))
        best = [int(values[row].argmax()) for row in rows]
        return total, best == last

    def sample(self, prompt: list[int], sampling: Sampling, seed: int, end: int) -> list[int]:
        """An answer by the definitions of penalties, top-k, top-p and Gumbel noise, token by token
        with plain loops.
        """
        answer: list[int] = []
        while len(answer) < sampling.max_tokens and (not answer or answer[-1] != end):
            logits = self.logits(prompt + answer)[-1].tolist()
            for token in set(prompt + answer):
                factor = sampling.repetition_penalty
                logits[token] *= 1 / factor if logits[token] > 0 else factor
            for token in set(answer):
                logits[token] -= sampling.frequency_penalty * answer.count(token)
                logits[token] -= sampling.presence_penalty
            if sampling.temperature == 0:
                answer.append(max(range(len(logits)), key=logits.__getitem__))
                continue
            scaled = [value / sampling.temperature for value in logits]
            order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
            order = order[: sampling.top_k or len(order)]
            shares = torch.tensor([scaled[token] for token in order]).softmax(0).tolist()
            kept, total = [], 0.0
            for token, share in zip(order, shares, strict=True):
                if total < sampling.top_p:
                    kept.append(token)
                total += share
            words = counter_words(counter_key(seed, "answer", 0, len(answer)), 0, len(scaled))
            uniform = (words.to(torch.float64) + 0.5) / WORDS
            noise = (-(-uniform.log()).log()).tolist()
            answer.append(max(kept, key=lambda token: scaled[token] + noise[token]))
        return answer
