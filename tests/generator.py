"""Greedy answers by transformers' own `generate`: an oracle for engines and commands."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Generator:
    """A causal language model with its tokenizer, loaded once, on the CPU."""

    def __init__(self, path: str | Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text, or of messages in the chat template with a generation prompt."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        text = self.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def complete(
        self,
        prompts: Sequence[str | list[dict[str, str]]],
        *,
        max_new_tokens: int,
        batch_size: int,
    ) -> list[str]:
        """Answers to the prompts in their order, without special tokens."""
        encoded = [self.encode(prompt) for prompt in prompts]
        answers: list[str] = []
        for first in range(0, len(encoded), batch_size):
            rows = {"input_ids": encoded[first : first + batch_size]}
            batch = self.tokenizer.pad(rows, padding=True, return_tensors="pt")
            output = self.model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            answered = output[:, batch["input_ids"].shape[1] :]
            answers += self.tokenizer.batch_decode(answered, skip_special_tokens=True)
        return answers
