"""docs/training.md: its configs run. Oracle: rows that serve them all."""

import re
from pathlib import Path

import pytest
import yaml
from training_files import align_config, metrics, preference_rows, run_here, write_rows

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "training.md").read_text()
CONFIGS = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("text", CONFIGS)
def test_configs_run(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Each as part of a short run's config."""
    rows = [row | {"messages": row["prompt"] + row["chosen"]} for row in preference_rows(8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = align_config(tiny_llama, data, **{"num_steps": 2, **yaml.safe_load(text)})
    assert len(metrics(run_here(config, tmp_path / "run"))) == config.num_steps
