"""Numbers of tokens in config.json and generation_config.json, carried into another vocabulary.

A field such as `eos_token_id` means a token, not a number: it becomes the number that the same text
has in the tokenizer that is written.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import InputError
from pipelines.merge.vocabulary import Tokens

_IDS = re.compile(r"(.*_)?token_(id|ids|index|indices|indexes)")
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
_PAIRS = {"forced_decoder_ids": 1, "sequence_bias": 0}  # which part of an entry is tokens
_MAPPINGS = ("lang_to_id", "task_to_id", "lang_code_to_id")
# Fields that may be null in every architecture.
_NULLABLE = re.compile(
    r"(bos|pad|sep|cls|unk|mask|decoder_start|forced_\w+|prev_sot|\w+_bos)_token_id"
)
_MISSING: Any = object()


@dataclass(slots=True)
class Carrier:
    """Carries one file's numbers.

    Attributes:
        file: for messages: the file that is carried.
        names: the text of each number where the file comes from.
        tokens: the written tokenizer's tokens with their numbers.
        sizes: of the vocabulary that the file's numbers are of, as configs may give it.
        notices: a line for each field whose token the written tokenizer lacks.
    """

    file: str
    names: Mapping[int, str]
    tokens: Tokens
    sizes: Collection[int | None]
    notices: list[str] = field(default_factory=list)

    def carry(self, settings: Mapping[str, Any], place: str = "") -> dict[str, Any]:
        """The settings with their tokens' new numbers, in nested settings too; those that name a
        vocabulary of another size (of sounds, of image codes) stay as they are.

        Raises:
            InputError: the written tokenizer lacks the token that ends texts.
        """
        return {key: self._field(key, value, f"{place}{key}") for key, value in settings.items()}

    def _field(self, key: str, value: Any, place: str) -> Any:
        if _IDS.fullmatch(key) or key in _LISTS:
            return self._ids(value, place)
        if key in _PAIRS and isinstance(value, list):
            pairs = [self._pair(entry, _PAIRS[key], place) for entry in value]
            return [pair for pair in pairs if pair is not _MISSING]
        if key in _MAPPINGS and isinstance(value, Mapping):
            found = {name: self._mapped(each, place) for name, each in value.items()}
            return {name: each for name, each in found.items() if each is not _MISSING}
        if isinstance(value, Mapping):
            size = value.get("vocab_size")
            if size is not None and size not in self.sizes:
                return value
            return self.carry(value, f"{place}.")
        return value

    def _ids(self, value: Any, place: str) -> Any:
        """A field's value: a number, or a list, which stays one."""
        found = self._mapped(value, place)
        empty = isinstance(value, list) and value and not found
        name = place.rpartition(".")[2]
        if found is not _MISSING and not empty:
            return found
        if name.startswith("eos_token_id"):
            raise InputError(
                f"{self.file}: {place}: found {value}, {self._text(value)}, which the written "
                "tokenizer does not have; allowed: a tokenizer with the token that ends texts, "
                "such as tokenizer: union"
            )
        if isinstance(value, list):
            return []
        return None if _NULLABLE.fullmatch(name) else -1

    def _mapped(self, value: Any, place: str) -> Any:
        """Numbers in any depth of lists; a token that is missing is left out of its list."""
        if isinstance(value, list):
            if value and all(isinstance(each, list) for each in value):  # of whole sequences
                found = [self._mapped(each, place) for each in value]
                return [new for new, old in zip(found, value, strict=True) if len(new) == len(old)]
            return [new for each in value if (new := self._mapped(each, place)) is not _MISSING]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            return value
        if self.names.get(value) in self.tokens:
            return self.tokens[self.names[value]]
        self._tell(value, place)
        return _MISSING

    def _pair(self, entry: Any, part: int, place: str) -> Any:
        """An entry of which one part is tokens."""
        if not isinstance(entry, list) or len(entry) != 2:
            return entry
        found = self._mapped(entry[part], place)
        if found is _MISSING or (isinstance(found, list) and len(found) != len(entry[part])):
            return _MISSING
        return [found if number == part else each for number, each in enumerate(entry)]

    def _text(self, value: Any) -> str:
        numbers = value if isinstance(value, list) else [value]
        texts = [repr(self.names[n]) if n in self.names else "no token" for n in numbers]
        return ", ".join(texts)

    def _tell(self, value: int, place: str) -> None:
        self.notices.append(
            f"{self.file}: {place}: {value} is {self._text(value)}, which the written tokenizer "
            "does not have; the output does without it"
        )
