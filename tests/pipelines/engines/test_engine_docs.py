"""The example of docs/evaluation.md, run as it stands there on tiny models."""

import re
from pathlib import Path

import pytest

from pipelines.merge import load_merge_config, merge
from tests.pipelines.checkpoints.digest_definition import weights_digest
from tests.pipelines.engines.references import save_chatty


def test_the_documented_lines(
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_chatty(Path("runs") / name, seed)
    Path("merge.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 0.5}\n"
        "models: [{model: runs/a}, {model: runs/b}]\n"
    )
    text = (project_root / "docs" / "evaluation.md").read_text()
    lines = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    names: dict = {}
    exec(lines, names)
    greedy, sampled = names["greedy"], names["sampled"]
    assert capsys.readouterr().out.startswith(f"{greedy[0].text} {greedy[0].finish}")
    assert greedy[0].weights == weights_digest(Path("runs/a"))
    assert len(sampled) == 2 and len(sampled[0].logprobs[0]) >= 5
    written = merge(load_merge_config("merge.yaml"), "written")
    assert names["digest"] == names["engine"].weights == weights_digest(Path(written))
