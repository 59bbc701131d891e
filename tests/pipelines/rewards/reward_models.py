"""Tiny random reward models, and made-up rows for them."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pipelines.rewards.rewardbench import SECTIONS
from tests.tiny_models import SPECIAL, save_tiny

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
}
HEADS = ("helpfulness", "honesty", "harmlessness")


def save_reward_model(
    path: Path, seed: int = 5, tokenizer: PreTrainedTokenizerFast | None = None, **fields: Any
) -> Path:
    """A Llama with one label, or with other fields, and with the tests' tokenizer or another."""
    fields = {"num_labels": 1, "num_key_value_heads": 2} | SIZES | fields
    if tokenizer is None:
        return save_tiny(LlamaForSequenceClassification, path, seed, dtype=torch.float32, **fields)
    torch.manual_seed(seed)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), **ends, **fields)
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def save_reward_models(root: Path) -> dict[str, Path]:
    """A Llama with one label, one with three, a BERT."""
    names = dict(enumerate(HEADS))
    numbers = {name: number for number, name in names.items()}
    bert = {"num_labels": 1} | SIZES
    return {
        "one": save_reward_model(root / "one"),
        "three": save_reward_model(
            root / "three", 6, num_labels=3, id2label=names, label2id=numbers
        ),
        "bert": save_tiny(
            BertForSequenceClassification, root / "bert", 7, dtype=torch.float32, **bert
        ),
    }


def bpe_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of 2,000 pieces of words, made from texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=SPECIAL[:3],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, first, last = SPECIAL[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=first, eos_token=last
    )


class Rewards:
    """transformers' own classes in float64, a conversation at a time and without padding.

    Args:
        head: number of the label.
    """

    def __init__(self, path: Path, head: int = 0) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForSequenceClassification.from_pretrained(path).double().eval()
        self._head = head

    @torch.no_grad()
    def of(self, conversation: str | list[dict[str, str]]) -> float:
        """The reward of messages in the chat template, or of a text, which ends a turn."""
        if isinstance(conversation, str):
            ids = self.tokenizer(conversation)["input_ids"] + [self.tokenizer.eos_token_id]
        else:
            ids = self.tokenizer.apply_chat_template(conversation, return_dict=False)
        return float(self._model(torch.tensor([ids])).logits[0, self._head])


def words(draw: random.Random, most: int) -> str:
    """Letters, one to `most` of them."""
    return " ".join(draw.choice("abcdefghij") for _ in range(draw.randint(1, most)))


def bench_rows(per_subset: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with the columns and subsets of RewardBench."""
    draw = random.Random(seed)
    subsets = [subset for weights in SECTIONS.values() for subset in weights]
    return [
        {
            "prompt": words(draw, 5),
            "chosen": words(draw, 9),
            "chosen_model": "m",
            "rejected": words(draw, 9),
            "rejected_model": "n",
            "subset": subset,
            "id": number,
        }
        for number, subset in enumerate(subsets * per_subset)
    ]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
