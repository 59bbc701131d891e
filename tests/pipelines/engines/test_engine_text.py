"""Tokens as texts. Oracle: tokenizers of three kinds whose texts are known."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipelines.checkpoints import Checkpoint
from pipelines.engines.text import Text
from pipelines.engines.weights import CheckpointWeights
from tests.tiny_models import save_tiny_llama


@pytest.mark.parametrize(("kind", "drops"), [("words", True), ("pieces", True), ("bytes", False)])
def test_the_space_before_the_first_word(tmp_path: Path, kind: str, drops: bool) -> None:
    path, space = save_tiny_llama(tmp_path / "m", 0), "▁" if kind == "pieces" else "Ġ"
    if kind != "words":  # which the model's own tokenizer has
        pieces = ["</s>", "a", space, f"{space}a"]
        merges = [(space, "a")]
        tokenizer = Tokenizer(models.BPE({e: i for i, e in enumerate(pieces)}, merges))
        if kind == "pieces":
            tokenizer.pre_tokenizer, tokenizer.decoder = (
                pre_tokenizers.Metaspace(),
                decoders.Metaspace(),
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        saved.save_pretrained(path)
    text = Text(CheckpointWeights(Checkpoint.open(path)), 64)
    token = text.encode("a a")[-1]
    assert text.decode([token, token]) == ("a a" if drops else " a a")
    assert text.drops_first_space is drops
