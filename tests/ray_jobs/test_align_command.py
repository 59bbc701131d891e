"""`poise align` from the command line: bad input is one line, and nothing is written.

Oracle: lines written by hand.
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.train import AlignConfig
from ray_jobs.cli import main
from tests.pipelines.train.training_files import preference_rows, write_rows
from tests.ray_jobs.alignments import write_run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A short run."""
    return write_run(tmp_path)


def spoil_model(folder: Path, **values: object) -> None:
    """Other values in the model's config."""
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD_INPUT: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no data": (
        lambda folder: (folder / "rows.jsonl").unlink(),
        [],
        "data: {folder}/rows.jsonl: no such file",
    ),
    "empty data": (
        lambda folder: write_rows(folder / "rows.jsonl", []),
        [],
        "data: {folder}/rows.jsonl: holds no rows",
    ),
    "other columns": (
        lambda folder: write_rows(folder / "rows.jsonl", [{"question": "a", "answer": "b"}]),
        [],
        "data: {folder}/rows.jsonl row 1: has no column 'chosen'; found: question, answer; needed: "
        "prompt, chosen, rejected (or chosen, rejected that begin with the prompt)",
    ),
    "too long": (
        lambda folder: write_rows(folder / "rows.jsonl", preference_rows(1)),
        ["max_length=4"],
        "data: {folder}/rows.jsonl row 1: found 13 tokens; allowed: max_length 4 (a response is "
        "never cut; too_long: cut_prompt or drop says what to do with such rows)",
    ),
    "no chat template": (
        lambda folder: (folder / "model" / "chat_template.jinja").unlink(),
        ["max_bad_share=0.5"],
        "data: {folder}/rows.jsonl row 1: holds messages, but the tokenizer has no chat template "
        "(40 of 40 rows are bad; allowed: a share of 0.5, max_bad_share)",
    ),
    "no model": (
        lambda folder: shutil.rmtree(folder / "model"),
        [],
        "model {folder}/model: no such directory",
    ),
    "another architecture": (
        lambda folder: spoil_model(folder, model_type="gpt2"),
        [],
        "model {folder}/model: has no tensor 'transformer.wte.weight', which its architecture "
        "needs",
    ),
    "another reference": (
        lambda folder: (
            shutil.copytree(folder / "model", folder / "other" / "model"),
            spoil_model(folder / "other", vocab_size=99),
        ),
        ["reference_model={folder}/other/model"],
        "reference_model: {folder}/other/model: found a vocabulary of 99 tokens; the model's has "
        "47",
    ),
    "batch": (
        lambda folder: None,
        ["global_batch_size=7"],
        "{folder}/config.yaml: global_batch_size: found 7; allowed: a multiple of num_workers (2)",
    ),
    "objective": (
        lambda folder: None,
        ["objective.name=ppo"],
        "{folder}/config.yaml: objective.name: found 'ppo'; allowed: 'sft', 'dpo', 'robust', "
        "'hinge', 'ipo', 'apo_zero', 'apo_down', 'bco_pair', 'simpo', 'orpo', "
        "'reward' or 'kto'",
    ),
    "field": (
        lambda folder: None,
        ["learning_rate=1"],
        "{folder}/config.yaml: learning_rate: unknown field; allowed: "
        + ", ".join(sorted(AlignConfig.model_fields))
        + "; did you mean optimizer.learning_rate?",
    ),
    "another run": (
        lambda folder: (
            (folder / ".out.partial").mkdir(),
            (folder / ".out.partial" / "run.json").write_text('{"fingerprint": "x"}'),
        ),
        [],
        "{folder}/.out.partial: holds an unfinished run of another config or other inputs; remove "
        "it, choose another output, or --force to begin anew",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_status_2_and_one_line(
    case: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file, the field, what was found, what is allowed; and nothing is written."""
    spoil, overrides, expected = BAD_INPUT[case]
    spoil(config.parent)
    overrides = [override.format(folder=config.parent) for override in overrides]
    before = sorted(config.parent.rglob("*"))
    monkeypatch.setattr("ray_jobs.align.ray_session", contextlib.nullcontext)
    monkeypatch.setattr("pipelines.train.run.check_cluster", lambda config: None)
    out = str(config.parent / "out")
    monkeypatch.setattr(sys, "argv", ["poise", "align", str(config), *overrides, "--out", out])
    with pytest.raises(SystemExit) as stop:
        main()
    found = capsys.readouterr()
    assert found.err == f"poise: {expected.format(folder=config.parent)}\n"
    assert stop.value.code == 2 and not found.out
    cache = config.parent / ".poise-cache"  # of tokens, which any later run may use
    after = sorted(config.parent.rglob("*"))
    assert [path for path in after if path != cache and cache not in path.parents] == before
