"""Write a world as files in the usual formats, with its tokenizer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.commit import staged_directory
from pipelines.tiny_world.architecture import architecture
from pipelines.tiny_world.content import make_content
from pipelines.tiny_world.documents import pretraining_documents, sft_conversations
from pipelines.tiny_world.preferences import preference_pairs
from pipelines.tiny_world.sizes import SIZES
from pipelines.tiny_world.tasks import harness_task, make_tasks
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


def build_world(out: str | Path, seed: int, size: str, *, force: bool = False) -> Path:
    """Make the world of a seed and write it below `out`; equal seeds give equal bytes.

    Files: `model/` (config.json and the tokenizer, from which models of this world begin),
    `data/pretrain.parquet` (column `text`), `data/sft.jsonl` (`messages`),
    `data/preferences/{helpful,honest,harmless,mixture}.jsonl` (`prompt`, `chosen`, `rejected`),
    `tasks/tasks.yaml` with its rows, and the same tasks for lm-evaluation-harness in
    `tasks/harness/*.yaml`.

    Raises:
        InputError: `out` exists and `force` is false.
    """
    import pyarrow
    import pyarrow.parquet

    content = make_content(seed, SIZES[size].num_known_people)
    with staged_directory(out, force=force) as folder:
        (folder / "data" / "preferences").mkdir(parents=True, exist_ok=True)
        (folder / "tasks" / "harness").mkdir(parents=True, exist_ok=True)
        texts = [f"{BEGIN} {text}" for text in pretraining_documents(content, seed)]
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, folder / "data" / "pretrain.parquet")
        conversations = [{"messages": turns} for turns in sft_conversations(content, seed)]
        _write_lines(folder / "data" / "sft.jsonl", conversations)
        for kind, pairs in preference_pairs(content, seed).items():
            _write_lines(folder / "data" / "preferences" / f"{kind}.jsonl", pairs)
        entries = []
        for entry, rows in make_tasks(content, seed):
            entries.append(entry)
            text = yaml.safe_dump(harness_task(entry), sort_keys=False)
            (folder / "tasks" / "harness" / f"{entry['name']}.yaml").write_text(text)
            for split, file in entry["files"].items():
                _write_lines(folder / "tasks" / file, rows[split])
        (folder / "tasks" / "tasks.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(folder / "model")
        architecture(SIZES[size], tokenizer).save_pretrained(folder / "model")
    return Path(out)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level unigram model: a word with its leading blank has a better score than its bytes.

    So each known word is one token, and any other text falls back to bytes. Text after a special
    token begins with a blank, so words are the same tokens everywhere.
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
