"""Write a world as files in the formats that users have."""

import json
from pathlib import Path
from typing import Any

import yaml

from pipelines.commit import staged_directory
from pipelines.tiny_world.content import make_content
from pipelines.tiny_world.documents import pretraining_documents, sft_conversations
from pipelines.tiny_world.preferences import preference_pairs
from pipelines.tiny_world.sizes import SIZES
from pipelines.tiny_world.tasks import make_tasks
from pipelines.tiny_world.tokenizer import make_tokenizer


def build_world(out: str | Path, seed: int, size: str) -> Path:
    """Make the world of a seed and write it below `out`; the same seed gives the same bytes.

    `data/pretrain.parquet` (column `text`), `data/sft.jsonl` (`messages`),
    `data/preferences/{helpful,honest,harmless,mixture}.jsonl` (`prompt`, `chosen`, `rejected`),
    `tasks/tasks.yaml` with its rows, and `tokenizer/`.

    Raises:
        InputError: `out` exists.
    """
    import pyarrow
    import pyarrow.parquet

    content = make_content(seed, SIZES[size].num_known_people)
    with staged_directory(out) as folder:
        (folder / "data" / "preferences").mkdir(parents=True, exist_ok=True)
        (folder / "tasks").mkdir(exist_ok=True)
        table = pyarrow.table({"text": pretraining_documents(content, seed)})
        pyarrow.parquet.write_table(table, folder / "data" / "pretrain.parquet")
        conversations = [{"messages": turns} for turns in sft_conversations(content, seed)]
        _write_lines(folder / "data" / "sft.jsonl", conversations)
        for kind, pairs in preference_pairs(content, seed).items():
            _write_lines(folder / "data" / "preferences" / f"{kind}.jsonl", pairs)
        entries = []
        for entry, rows in make_tasks(content, seed):
            entries.append(entry)
            for split, file in entry["files"].items():
                _write_lines(folder / "tasks" / file, rows[split])
        (folder / "tasks" / "tasks.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
        make_tokenizer().save_pretrained(folder / "tokenizer")
    return Path(out)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
