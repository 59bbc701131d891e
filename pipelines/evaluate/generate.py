"""Batched greedy generation with transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from pipelines.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Generator:
    """A causal language model with its tokenizer, loaded once, for greedy completions.

    Args:
        path: a Hugging Face checkpoint directory.

    Raises:
        InputError: the directory is missing or cannot be loaded.
    """

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (Path(path) / "config.json").is_file():
            raise InputError(f"model {path}: no config.json; expected a Hugging Face checkpoint")
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", local_files_only=True, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"model {path}: does not load: {first}") from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # transformers wraps `to`, so mypy does not see that it is a method.
        self.model: PreTrainedModel = model.to(device).eval()  # type: ignore[arg-type]
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text, or of messages in the chat template with a generation prompt."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if self.tokenizer.chat_template is None:
            name = self.tokenizer.name_or_path
            raise InputError(f"model {name}: its tokenizer has no chat template")
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
        progress: Callable[[int], Any] = lambda done: None,
    ) -> list[str]:
        """Greedy completions of the prompts, in their order, without special tokens.

        Prompts of similar length share a batch, so there is little padding.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
        completions = [""] * len(encoded)
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = self.tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, padding=True)
            ids = torch.tensor(batch["input_ids"], device=self.model.device)  # (batch, length)
            mask = torch.tensor(batch["attention_mask"], device=self.model.device)
            # transformers' types do not say which models can generate.
            output = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                **_NO_SAMPLING,
            )
            texts = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                completions[i] = text
            progress(len(chosen))
        return completions


# Greedy decoding ignores the sampling options of a checkpoint's generation_config.
_NO_SAMPLING = {"temperature": None, "top_p": None, "top_k": None}
