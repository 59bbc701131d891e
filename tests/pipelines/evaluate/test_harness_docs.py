"""The example of docs/evaluation.md on tasks of lm-evaluation-harness, run as it stands there; the
tiny world's tasks in this form.

Oracle: what the example says, and the numbers of the tasks in the form of `tasks.yaml`.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipelines.engines import Sampling, open_engine
from pipelines.evaluate.graders import grade
from pipelines.evaluate.harness import load_tasks, measure_tasks
from pipelines.evaluate.tasks import load_rows
from pipelines.evaluate.tasks import load_tasks as load_old_tasks
from pipelines.tiny_world import build_world
from tests.pipelines.engines.references import save_chatty
from tests.ray_jobs.command_line import poise

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("own_cache")


def save_random_model(path: Path, tokenizer: Path) -> Path:
    """A random Llama with a tokenizer."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    ends = {"eos_token_id": loaded.eos_token_id, "pad_token_id": loaded.pad_token_id}
    config = LlamaConfig(vocab_size=len(loaded), **sizes, **heads, **ends)
    LlamaForCausalLM(config).save_pretrained(path)
    loaded.save_pretrained(path)
    return path


def test_the_documented_task(
    tmp_path: Path,
    project_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_chatty(Path("runs/a"), 1)
    text = (project_root / "docs" / "evaluation.md").read_text()
    section = text[text.index("## Tasks of lm-evaluation-harness") :].split("\n## ")[0]
    [task] = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    [lines] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    folder = Path("my_tasks")
    folder.mkdir()
    (folder / "letters.yaml").write_text(task)
    documents = [
        {"letter": a, "next": b, "topic": a in "aeiou"} for a, b in ("ab", "cd", "ef", "gh")
    ]
    for name in ("examples", "development", "letters"):
        rows = "".join(json.dumps(each) + "\n" for each in documents)
        (folder / f"{name}.jsonl").write_text(rows)
    names: dict = {}
    exec(lines, names)
    printed = capsys.readouterr().out.splitlines()
    found = names["results"]["letters"]
    rights = sum(d["next"] in (a.text or "") for d, a in zip(documents, found.answers, strict=True))
    assert printed == [f"contains,none {rights / 4} 4"]
    turns = re.findall("<user>after . comes", found.requests[0].context)
    assert len(turns) == 3 and found.task.clusters == ("True", "False", "True", "False")
    written = json.loads(names["file"].read_text())
    assert written["results"]["letters"]["contains,none"] == rights / 4
    assert poise(monkeypatch, "tasks", "--include-path", "my_tasks", "--json") == 0
    assert json.loads(capsys.readouterr().out)["letters"] == {
        "requests": "generate_until",
        "num_fewshot": 2,
        "chat": True,
        "development": {"documents": 4, "split": "validation"},
        "test": {"documents": 4, "split": "test"},
        "metrics": ["contains"],
    }
    assert poise(monkeypatch, "tasks", "leters", "--include-path", "my_tasks") == 2
    line = "poise: tasks: unknown task 'leters' in my_tasks; nearest: letters\n"
    assert capsys.readouterr().err.endswith(line)
    samples = [*names["file"].parent.glob("samples_letters_*.jsonl")]
    assert len(samples) == 1 and len(samples[0].read_text().splitlines()) == 4


@pytest.mark.slow
def test_the_tiny_worlds_tasks_have_the_numbers_of_their_old_form(tmp_path: Path) -> None:
    world = build_world(tmp_path / "world", 7, "smoke")
    model = save_random_model(tmp_path / "model", world / "model")
    engine = open_engine(model)
    folder = world / "tasks"
    old = load_old_tasks(folder / "tasks.yaml")
    for split in ("development", "test"):
        tasks = load_tasks([{"include_path": folder / "harness"}], split, limit=6)
        assert {task.name for task in tasks} == {task.name for task in old}
        results = measure_tasks(engine, tasks)
        for task in old:
            rows = load_rows(task, split)[:6]
            prompts = [row.prompt for row in rows]
            answers = [each.text for each in engine.generate(prompts, Sampling(max_tokens=32))]
            found = results[task.name]
            assert [each.text for each in found.answers] == answers
            assert list(found.task.clusters) == [row.cluster for row in rows]
            graded = [task.grader.name, task.grader.parameters]
            # The answers of a random model are wrong: the row's own are right, and so are graded.
            for row, place in zip(rows, range(6), strict=True):
                right = task.grader.parameters.get("phrase") or row.answers[0]
                for text in (right, answers[place]):
                    own = found.task.grading
                    assert own is not None and own.alone
                    target = found.task.library.doc_to_target(dict(found.task.document(place)))
                    expected = grade(graded[0], text, row.answers, graded[1])
                    assert own.graded(target, [text]) == {graded[0]: expected}
