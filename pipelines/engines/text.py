"""From prompts to tokens and back: the same for every engine, so that answers can be compared."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines.engines.interface import Conversation, Prompt
from pipelines.engines.weights import Weights
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint, fingerprint_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_FILE = "generation_config.json"


class Text:
    """A model's tokenizer with its chat template and the tokens that end its answers.

    Attributes:
        name: the model's, for messages to the user.
        ends: of config.json or generation_config.json, and the tokenizer's own.
        context: the most tokens that the model reads.
    """

    def __init__(self, weights: Weights, context: int) -> None:
        self.name, self.context = weights.name, context
        self.key = _key(weights)
        with TemporaryDirectory() as folder:
            self.tokenizer: PreTrainedTokenizerBase = _load(weights, Path(folder))
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.ends = _ends(weights, self.tokenizer)

    def after_swap(self, weights: Weights) -> "Text":
        """The text of new weights in the same engine; it may have another chat template.

        Raises:
            InputError: its tokens have other numbers.
        """
        if _key(weights) == self.key:
            return self
        new = Text(weights, self.context)
        if new.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise InputError(
                f"swap: {weights.name}: its tokenizer has other tokens than {self.name}; allowed: "
                "the same"
            )
        return new

    def encode(self, prompt: Prompt) -> list[int]:
        """As `Engine.encode`."""
        return self._tokens(prompt, begin_answer=True)

    def conversation(self, conversation: Conversation) -> list[int]:
        """The tokens of a whole conversation, or of a text, for a reward model."""
        return self._tokens(conversation, begin_answer=False)

    def pair(
        self, context: str | Sequence[int], continuation: str | Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """The tokens of a context and of its continuation, as in `Engine.log_likelihoods`."""
        if not isinstance(context, str):
            return list(context), self._continued(continuation)
        bare = context.rstrip()
        if not isinstance(continuation, str):
            return self._plain(context) if context else [self.beginning], list(continuation)
        if not bare:
            tokens, first = self._continued(context + continuation), self.beginning
            return ([first], tokens) if tokens[:1] != [first] else (tokens[:1], tokens[1:])
        before = self._plain(bare)
        return before, self._plain(bare + context[len(bare) :] + continuation)[len(before) :]

    @property
    def beginning(self) -> int:
        """The token that begins texts, or else the one that ends them."""
        token = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if token is None else token)

    def check_room(self, lengths: Sequence[int], most: int, what: str) -> None:
        """Raise InputError, which counts them, where inputs have more than `most` tokens, or none.

        Args:
            what: the inputs, in the plural.
        """
        long = [place for place, length in enumerate(lengths) if length > most]
        if long:
            raise InputError(
                f"model {self.name}: {len(long)} of {len(lengths)} {what} are too long: number "
                f"{long[0]} has {lengths[long[0]]} tokens; allowed: up to {most}"
            )
        if 0 in lengths:
            raise InputError(f"model {self.name}: {what}: number {lengths.index(0)} has no token")

    def answer(self, tokens: Sequence[int], stop: Sequence[str]) -> tuple[str, str]:
        """The text of generated tokens, up to the first stop text, and what ended it."""
        ended = bool(tokens) and tokens[-1] in self.ends
        text = self.decode(tokens[:-1] if ended else tokens)
        places = [place for each in stop if (place := text.find(each)) >= 0]
        if places:
            return text[: min(places)], "stop"
        return text, "stop" if ended else "length"

    @cached_property
    def drops_first_space(self) -> bool:
        """Whether `decode` leaves out the space before an answer's first word, as where tokens are
        words, or pieces that begin with it.
        """
        token = self._continued("a a")[-1:]
        alone = self.decode(token)
        return not alone or self.decode(token * 2) != alone * 2

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as a text, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _tokens(self, prompt: Prompt, begin_answer: bool) -> list[int]:
        """The tokens of a text, of messages in the chat template, or tokens as they are."""
        if isinstance(prompt, str):
            return self._plain(prompt)
        if not prompt or isinstance(prompt[0], int):
            return [token for token in prompt if isinstance(token, int)]
        return self._templated(prompt, begin_answer)

    def _plain(self, text: str) -> list[int]:
        """A text's tokens; what begins texts is not added where it is there."""
        first = self.tokenizer.bos_token
        if first and text.startswith(first):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(text)["input_ids"])

    def _continued(self, text: str | Sequence[int]) -> list[int]:
        """The tokens of a text that follows another one."""
        if not isinstance(text, str):
            return list(text)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _templated(self, messages: Any, begin_answer: bool) -> list[int]:
        """Messages in the chat template."""
        if not self.tokenizer.chat_template:
            raise InputError(f"model {self.name}: its tokenizer has no chat template")
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=begin_answer
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _load(weights: Weights, folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer, from copies of its files and of config.json in an empty folder.

    Raises:
        InputError: it does not load.
    """
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(json.dumps(weights.config))
    for place, file in weights.text_files.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file, str):
            target.write_text(file, encoding="utf-8")
        else:
            target.symlink_to(file.absolute())
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"model {weights.name}: its tokenizer does not load: {first}") from None


def tokens_key(text: Text) -> str:
    """32 hex digits of a tokenizer's tokens with their numbers."""
    return fingerprint(text.tokenizer.get_vocab())


def _key(weights: Weights) -> str:
    """What the tokenizer and the ends depend on; a text and a file that holds it are one."""
    digests = {
        place: hashlib.blake2b(file.encode(), digest_size=16).hexdigest()
        if isinstance(file, str)
        else fingerprint_file(file)
        for place, file in weights.text_files.items()
    }
    return fingerprint([digests, weights.config.get("eos_token_id")])


def _ends(weights: Weights, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The tokens that end an answer."""
    settings: Mapping[str, Any] = weights.config
    file = weights.text_files.get(GENERATION_FILE)
    if file is not None:
        text = file if isinstance(file, str) else file.read_text(encoding="utf-8")
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise InputError(
                f"{weights.name}: {GENERATION_FILE}: not valid JSON: {error}"
            ) from None
    named = settings.get("eos_token_id")
    found = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*found, tokenizer.eos_token_id) if isinstance(token, int))
