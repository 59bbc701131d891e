"""The tiny world's tokenizer: whole words as single tokens, bytes for any other text."""

from typing import TYPE_CHECKING

from pipelines.tiny_world.words import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<user>", "<assistant>"
BLANK = "Ġ"  # how byte-level tokenizers write a blank
SPECIAL = (PAD, BEGIN, END, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant> {{ message['content'] }}{{ eos_token }}"
    "{% else %}<user> {{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level unigram model: a word with its leading blank costs less than its letters.

    A word costs one token wherever it stands; any other text falls back to bytes. Text that
    follows a special token begins with a blank, so words look the same everywhere.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"{BLANK}{word}" for word in vocabulary()]
    scores = {**dict.fromkeys([*SPECIAL, *alphabet], -10.0), **dict.fromkeys(words, -1.0)}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
