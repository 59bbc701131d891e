"""Tiny random checkpoints for tests: a word tokenizer with a chat template, a Llama, a GPT-2."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", "yes", "no", "hello", "sorry", "."]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}"
    "{% else %}<assistant>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny(
    make: type[PreTrainedModel], path: Path, seed: int, *, dtype: torch.dtype, **fields: Any
) -> Path:
    """A random model of an architecture with its tokenizer, saved as a Hugging Face checkpoint."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = make.config_class(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    make(config).to(dtype).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def save_tiny_llama(
    path: Path,
    seed: int = 0,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Path:
    """A random Llama of 20k parameters, or of other sizes; returns `path`."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    fields = sizes | fields
    return save_tiny(LlamaForCausalLM, path, seed, dtype=dtype, tie_word_embeddings=tied, **fields)


def save_tiny_gpt2(path: Path, seed: int = 0) -> Path:
    """A random GPT-2, whose linear layers are stored as (in, out) and whose head is tied."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return save_tiny(GPT2LMHeadModel, path, seed, dtype=torch.float32, **sizes)
