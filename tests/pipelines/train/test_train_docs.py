"""docs/training.md: its configs run.

Oracle: rows that serve them all; for the router a mixture of experts.
"""

import re
from pathlib import Path

import pytest
import yaml
from training_files import align_config, metrics, preference_rows, run_here, write_rows

from tests.hub_models import save_as_on_hub

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "training.md").read_text()
CONFIGS = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("text", CONFIGS)
def test_configs_run(text: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Each as part of a short run's config."""
    rows = [row | {"messages": row["prompt"] + row["chosen"]} for row in preference_rows(8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    model = tiny_llama
    if "router_loss" in text:
        model = save_as_on_hub("mixtral", tmp_path / "mixtral")
    config = align_config(model, data, **{"num_steps": 2, **yaml.safe_load(text)})
    steps = [line["step"] for line in metrics(run_here(config, tmp_path / "run"))]
    first = 0 if config.evaluation is not None and config.evaluation.on_start else 1
    assert config.num_steps is not None and steps == list(range(first, config.num_steps + 1))
