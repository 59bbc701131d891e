"""Words that a masked language model would write in a place, and how alike two texts are to an
encoder of sentences. Both are checkpoints of the user: safetensors, without code of their own.
"""

import heapq
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint_directory
from pipelines.robustness.sources import in_case_of
from pipelines.robustness.template import STOP_WORDS, is_word

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
_MARKS = ("\u0120", "\u2581")  # begin a token that begins a word, in BPE and in SentencePiece
_GOES_ON = "##"  # begins a token that goes on with a word, in WordPiece


class MaskedModel:
    """A masked language model on the CPU, in float32.

    Args:
        folder: its checkpoint.

    Raises:
        InputError: it does not load, or its tokenizer has no mask.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer, self._model = _loaded("model", folder, "AutoModelForMaskedLM")
        if self._tokenizer.mask_token_id is None or not self._tokenizer.is_fast:
            raise InputError(f"model: {folder}: allowed: a fast tokenizer with a mask token")
        positions = getattr(self._model.config, "max_position_embeddings", None) or 512
        self._most = min(positions, self._tokenizer.model_max_length)
        self._first, self._inner = _pieces(self._tokenizer)
        self._words = {
            number: text
            for number, text in self._first.items()
            if len(text) > 1 and text.casefold() not in STOP_WORDS
        }

    @torch.inference_mode()
    def words(self, before: str, word: str, after: str, count: int, *, mask: bool) -> list[str]:
        """The most likely other words at a word's place, the likeliest first.

        Args:
            before: the text before the word.
            after: the text after it.
            count: how many at most.
            mask: with the word masked, as in BAE; otherwise it is read in its place, as in
                BERT-Attack. In place of a word of several tokens words of as many tokens are
                written, ranked by the product of their tokens' probabilities (Li et al. 2020,
                section 3.2, where it is called perplexity).
        """
        tokens, place, length = self._tokens(before, word, after, mask)
        logits = self._model(torch.tensor([tokens])).logits[0, place : place + length]
        found: dict[str, None] = {}
        others = self._single(logits[0]) if length == 1 else self._joined(logits, count)
        for other in others:
            if other.casefold() != word.casefold():
                found[in_case_of(word, other)] = None
                if len(found) == count:
                    break
        return list(found)

    def _single(self, logits: Tensor) -> Iterator[str]:
        """The words of one token, the likeliest first."""
        for token in logits.argsort(descending=True, stable=True).tolist():
            if token in self._words:
                yield self._words[token]

    def _joined(self, logits: Tensor, count: int) -> Iterator[str]:
        """Words of as many tokens as there are rows, the likeliest first: so many that `count` are
        left without the word itself and without stop words. The best of all products, because a
        beam loses none where each factor depends on its place alone.
        """
        most = count + 1 + len(STOP_WORDS)
        beam = [(0.0, "")]
        for number, row in enumerate(logits.log_softmax(-1)):
            pieces = self._inner if number else self._first
            numbers = torch.tensor(list(pieces))
            if not len(numbers):
                return
            best = row[numbers].topk(min(most, len(numbers)))
            likely = [
                (value, pieces[int(numbers[at])])
                for value, at in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            grown = [(sum_ + value, text + piece) for sum_, text in beam for value, piece in likely]
            beam = heapq.nlargest(most, grown, key=lambda pair: pair[0])
        for _, text in beam:
            if is_word(text) and text.casefold() not in STOP_WORDS:
                yield text

    def _tokens(self, before: str, word: str, after: str, mask: bool) -> tuple[list[int], int, int]:
        """The tokens of the text, the first of the word's place, and how many are there: one mask,
        or the word's own. Of a long text so many as the model has positions, around the word.
        """
        encoded = self._tokenizer(before + word + after, return_offsets_mapping=True, verbose=False)
        start, end = len(before), len(before) + len(word)
        own = [n for n, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
        tokens = list(encoded["input_ids"])
        middle = tokens[own[0] : own[-1] + 1]
        if mask:
            middle = [self._tokenizer.mask_token_id]
        tokens = tokens[: own[0]] + middle + tokens[own[-1] + 1 :]
        first = max(0, min(own[0] - self._most // 2, len(tokens) - self._most))
        kept = tokens[first : first + self._most]
        return kept, own[0] - first, min(len(middle), len(kept) - (own[0] - first))


class SentenceEncoder:
    """An encoder whose vectors of tokens are averaged, as in all-MiniLM.

    Args:
        folder: its checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer, self._model = _loaded("encoder", folder, "AutoModel")

    @torch.inference_mode()
    def cosine(self, first: str, second: str) -> float:
        """The cosine of two texts' vectors."""
        inputs = self._tokenizer(
            [first, second], padding=True, truncation=True, return_tensors="pt", verbose=False
        )
        hidden = self._model(**inputs).last_hidden_state  # (2, length, width)
        weights = inputs["attention_mask"][..., None].to(hidden.dtype)
        one, other = (hidden * weights).sum(1) / weights.sum(1)
        return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@cache
def open_masked_model(folder: Path) -> MaskedModel:
    """A model, loaded once in a process."""
    return MaskedModel(folder)


@cache
def open_encoder(folder: Path) -> SentenceEncoder:
    """An encoder, loaded once in a process."""
    return SentenceEncoder(folder)


def checkpoint_digest(field: str, folder: Path) -> str:
    """32 hex digits of a checkpoint's files.

    Raises:
        InputError: none there, or only weights that are no safetensors.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{field}: {folder}: no Hugging Face checkpoint there")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{field}: {folder}: no safetensors there; others are not read")
    return fingerprint_directory(folder, _FILES)


def _loaded(
    field: str, folder: Path, kind: str
) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    """A checkpoint's tokenizer and model."""
    import transformers

    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **given)
        model = getattr(transformers, kind).from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, **given
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{field}: {folder}: does not load: {first}") from None
    return tokenizer, model.eval()


def _pieces(tokenizer: "PreTrainedTokenizerBase") -> tuple[dict[int, str], dict[int, str]]:
    """The letters of tokens that begin a word, and of those that go on with one."""
    tokens = tokenizer.get_vocab()
    mark = next((each for each in _MARKS if any(t.startswith(each) for t in tokens)), "")
    going_on = "" if mark else _GOES_ON
    first: dict[int, str] = {}
    inner: dict[int, str] = {}
    for token, number in sorted(tokens.items(), key=lambda pair: pair[1]):
        begins = token.startswith(mark) if mark else not token.startswith(going_on)
        text = token.removeprefix(mark if begins else going_on)
        if is_word(text):
            (first if begins else inner)[number] = text
    return first, inner
