"""docs/data.md: its configs run, and its table has all readers. Oracle: rows for each config."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_files import metrics, run_here, write_rows

from pipelines.config import check
from pipelines.train import AlignConfig
from pipelines.train.rows.readers import READERS
from tests.hub_stub import Stub

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()
CONFIGS = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
QUESTION = {"question": "a b", "chosen": "yes", "rejected": "no"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "orca.jsonl": [QUESTION | {"system": "c"}] * 4,
    "sharegpt.jsonl": [
        {"conversations": [{"from": "question", "value": "a"}, {"from": "gpt", "value": "yes"}]}
    ]
    * 4,
    "HelpSteer/train.jsonl": [
        {"prompt": "a", "response": word, "helpfulness": i, "correctness": 1, "coherence": 1}
        for i, word in enumerate(("no", "yes"))
    ],
    "PKU-SafeRLHF/train.jsonl": [
        {"prompt": "b", "response_0": "yes", "response_1": "no"}
        | {"better_response_id": 0, "safer_response_id": 0}
    ]
    * 10,
    "mine.jsonl": [QUESTION] * 3,
    "scored.jsonl": [QUESTION | {"confidence": 0.5 + i} for i in range(4)],
}
PAIR = {"prompt": "a b", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize("text", CONFIGS)
def test_configs_run(text: str, hub: Stub, tiny_llama: Path, tmp_path: Path) -> None:
    """As they stand, on a tiny model and a few rows."""
    (tmp_path / "published").mkdir()
    write_rows(tmp_path / "published" / "train.jsonl", [PAIR] * 4)
    hub.kinds["org/preferences"] = "datasets"
    hub.add("org/preferences", tmp_path / "published", "v1.0")
    for name, rows in ROWS.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "data" / name, rows)
    values = yaml.safe_load(text.replace("data/", f"{tmp_path}/data/"))
    values |= {"model": tiny_llama, "strategy": "single", "num_workers": 1, "num_epochs": None}
    values |= {"num_steps": 1, "global_batch_size": 4}
    run = run_here(check(values, AlignConfig, "data.md"), tmp_path / "run")
    (line,) = metrics(run)
    if isinstance(values["data"], list):
        names = {Path(each["path"]).stem for each in values["data"]}
        assert {name for name in line if "/" in name} == {f"rows/{name}" for name in names}


def test_every_reader_is_in_the_table() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.M)) == set(READERS)
