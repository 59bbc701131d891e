"""The configs that users copy: all run, the papers' models fit their plans, memory as promised.

Oracle: the papers' settings, and the memory that a worker is measured to take.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_files import align_config, metrics, preference_rows, run_here, write_rows
from transformers import AutoConfig, AutoModelForCausalLM

from pipelines.config import Config, check, load_config, tell_once
from pipelines.errors import InputError
from pipelines.train import AlignConfig
from pipelines.train.config import LoraSettings, OptimizerConfig
from pipelines.train.evaluation_config import EvaluationConfig
from pipelines.train.memory import Memory, estimate_memory, shape_of
from pipelines.train.objective_config import ObjectiveConfig
from pipelines.train.other_names import OTHER_NAMES
from pipelines.train.run import Plan, _unfinished_run
from ray_jobs.align import describe_plan
from tests.tiny_models import tiny_tokenizer

SECTIONS: dict[str, type[Config]] = {
    "evaluation": EvaluationConfig,
    "lora": LoraSettings,
    "objective": ObjectiveConfig,
    "optimizer": OptimizerConfig,
}
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "align"
QWEN: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
PAPERS = {
    "online-merging-adamw-qwen1.5-1.8b": (
        QWEN
        | {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936},
        1_836_828_672,
    ),
    "online-merging-ondare-qwen1.5-7b": (
        QWEN
        | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 151936},
        7_721_324_544,
    ),
    "online-merging-onties-llama-3-8b": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
        8_030_261_248,
    ),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_runs(path: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """On a tiny model and a few rows, in one process, with everything else as it stands."""
    rows = [row | {"messages": row["prompt"] + row["chosen"]} for row in preference_rows(16)]
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "train_prefs.jsonl", rows)
    config = load_config(path, AlignConfig)
    data = folder if config.split else folder / "train_prefs.jsonl"
    overrides = [f"model={tiny_llama}", f"data={data}", "strategy=single", "num_workers=1"]
    overrides += ["global_batch_size=8", "num_epochs=1"]
    if config.optimizer.tau is not None:
        overrides.append(f"optimizer.tau={{base: {tiny_llama}, tuned: {tiny_llama}}}")
    lines = metrics(run_here(load_config(path, AlignConfig, overrides), tmp_path / "run"))
    assert len(lines) == (4 if config.objective.name == "kto" else 2)  # pairs are two rows of kto


@pytest.mark.parametrize("name", PAPERS)
def test_paper_models_are_planned_without_their_weights(name: str, tmp_path: Path) -> None:
    """Built on meta tensors: their size, and what the paper's setting needs on each of 8 GPUs."""
    values, num_parameters = PAPERS[name]
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    shape = shape_of(tmp_path)
    assert shape.num_parameters == num_parameters
    config = load_config(CONFIGS / f"{name}.yaml", AlignConfig)
    memory = estimate_memory(shape, config)
    kept = {"adamw": 0.0, "ondare": 2.0, "onties": min(2.0, 6 * (config.optimizer.density or 0))}
    bytes_each = 16 + kept[config.optimizer.name]  # gradients too
    assert memory.state + memory.gradients == pytest.approx(bytes_each * num_parameters / 8, 1e-6)
    assert memory.total < 80e9


def save_without_weights(path: Path, values: dict[str, Any]) -> None:
    """A checkpoint with the names and shapes of a model, and a file with a hole for its weights."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in model.state_dict().items():
        end = place + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    tiny_tokenizer().save_pretrained(path)


@pytest.mark.parametrize("name", PAPERS)
def test_paper_configs_run_dry(name: str, tmp_path: Path, project_root: Path) -> None:
    """`poise align CONFIG --plan` on models of their size: parameters, steps, tokens, memory."""
    values, num_parameters = PAPERS[name]
    save_without_weights(tmp_path / "model", values | {"tie_word_embeddings": False})
    config = load_config(CONFIGS / f"{name}.yaml", AlignConfig)
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train_prefs.jsonl", preference_rows(640))
    model, data = tmp_path / "model", tmp_path / "data"
    overrides = [f"model={model}", f"data={data if config.split else data / 'train_prefs.jsonl'}"]
    if config.optimizer.tau is not None:
        overrides.append(f"optimizer.tau={{base: {model}, tuned: {model}}}")
    command = [sys.executable, "-m", "ray_jobs.cli", "align", CONFIGS / f"{name}.yaml"]
    done = subprocess.run(
        [*command, *overrides, "--plan"],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = {line[:15].strip(): line[16:] for line in done.stdout.splitlines()}
    assert lines["parameters"] == f"{num_parameters:,}"
    assert lines["rows"] == "640 of 640 (0 bad, 0 dropped, 0 prompts cut)"
    assert lines["steps"] == f"{round(config.num_epochs * 640 / 128)} of 128 rows"
    assert lines["strategy"] == f"{config.strategy} on 8 worker(s), bf16"
    total = float(lines["memory"].split()[1])
    assert 16 * num_parameters / 8 / 1e9 < total < 80
    assert not (tmp_path / ".poise-cache").exists()


def test_plan_says_what_a_run_needs(tiny_llama: Path, preferences: Path) -> None:
    """One line each for what is done and what it costs."""
    lines = describe_plan(align_config(tiny_llama, preferences)).splitlines()
    values = {line[:15].strip(): line[16:] for line in lines}
    assert values["rows"] == "40 of 40 (0 bad, 0 dropped, 0 prompts cut)"
    assert values["steps"] == "6 of 8 rows"
    assert {"state", "gradients", "activations", "logits"} <= values.keys()


def test_memory_formula_by_hand(tiny_llama: Path, preferences: Path) -> None:
    """Single and sharded, on a model whose numbers are small."""
    shape = shape_of(tiny_llama)
    n = shape.num_parameters
    assert n == 2 * shape.largest_block + shape.outside_blocks
    config = align_config(tiny_llama, preferences, micro_batch_size=2, max_length=10)
    tokens, width = 2 * 2 * 10, 15 * 32 + 4 * 48
    assert estimate_memory(shape, config) == Memory(
        state=12 * n,
        weights=0,
        gradients=4 * n,
        gathered=0,
        activations=4 * tokens * width * 2,
        logits=tokens * shape.vocabulary * 16,
        reference=0,
        host=0,
    )
    sharded = align_config(
        tiny_llama, preferences, strategy="zero3", num_workers=4, precision="bf16"
    )
    memory = estimate_memory(shape, sharded)
    assert (memory.state, memory.weights, memory.gradients) == (12 * n // 4, 2 * n // 4, 4 * n // 4)
    live = config.model_copy(update={"reference_log_probabilities": "on_the_fly"})
    assert estimate_memory(shape, live).reference == 4 * n + 4 * tokens * shape.vocabulary
    v, outside = shape.vocabulary, shape.outside_blocks
    chunked = live.model_copy(update={"logits_chunk": 8})
    memory = estimate_memory(shape, chunked)
    assert (memory.logits, memory.reference) == (8 * v * 16 + 8 * v * 32, 4 * n + 4 * 8 * v)
    divided = chunked.model_copy(update={"strategy": "fsdp2", "num_workers": 2})
    assert estimate_memory(shape, divided).reference == 2 * n + 4 * 8 * v + 4 * outside
    offloaded = config.model_copy(update={"activation_offload": True})
    assert estimate_memory(shape, offloaded).activations == 4 * tokens * width
    assert estimate_memory(shape, offloaded).host == 4 * tokens * width * 2
    adapters = live.model_copy(update={"lora": LoraSettings()})
    assert estimate_memory(shape, adapters).reference == 4 * tokens * shape.vocabulary
    trained = 16 * 2 * (4 * (32 + 32) + 3 * (32 + 48))  # rank, layers, their inputs and outputs
    assert estimate_memory(shape, adapters).state == 4 * n + 12 * trained
    assert estimate_memory(shape, adapters).gradients == 4 * trained
    cpu = sharded.model_copy(update={"cpu_offload": True})
    memory = estimate_memory(shape, cpu)
    assert (memory.state, memory.gradients, memory.host) == (0, 0, 16 * n // 4)


@pytest.mark.parametrize(
    ("changes", "kept", "on_host"),
    [
        ({"name": "ondare", "density": 0.5}, 2.0, 0.0),
        ({"name": "onties", "density": 0.1}, 0.6, 0.0),
        ({"name": "onties", "density": 0.9}, 2.0, 0.0),
        ({"name": "ondare", "density": 0.5, "delta_placement": "host"}, 0.0, 2.0),
        ({"name": "ondare", "density": 0.5, "delta_placement": "source"}, 0.0, 0.0),
        ({"name": "ondare", "density": 0.5, "merge_every": 5}, 6.0, 0.0),
        ({"name": "ondare", "density": 0.5, "ema": {"coefficient": 0.1}}, 10.0, 0.0),
    ],
)
def test_memory_of_online_merging(
    tiny_llama: Path, preferences: Path, changes: dict[str, object], kept: float, on_host: float
) -> None:
    """tau, anchor and average, in bytes a parameter beyond AdamW's 12."""
    tau = {"base": tiny_llama, "tuned": tiny_llama}
    optimizer = OptimizerConfig(learning_rate=1e-5, alpha=1e-7, tau=tau, **changes)
    config = align_config(tiny_llama, preferences).model_copy(update={"optimizer": optimizer})
    shape = shape_of(tiny_llama)
    memory = estimate_memory(shape, config)
    assert memory.state == pytest.approx((12 + kept) * shape.num_parameters, abs=1)
    assert memory.host == pytest.approx(on_host * shape.num_parameters, abs=1)


MEASURED = (
    "gradient checkpointing",
    "ondare, merge_every 2",
    "fsdp2, ondare, bf16",
    "zero3, onties, bf16",
)


@pytest.fixture(scope="module")
def measured_ratios(project_root: Path) -> dict[str, float]:
    """The most a worker holds, beyond its start, as a part of the formula's number."""
    command = [sys.executable, "benchmarks/memory.py", "--only", *MEASURED]
    output = subprocess.run(command, cwd=project_root, capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in output.stdout.splitlines()]
    return {row[0]: float(row[-1]) for row in rows if row[0] in MEASURED}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_memory_formula_against_measurement(name: str, measured_ratios: dict[str, float]) -> None:
    """Within a third."""
    assert measured_ratios[name] == pytest.approx(1, abs=0.33)


@pytest.mark.parametrize(
    ("fields", "package", "message"),
    [
        (
            {"strategy": "zero2"},
            "deepspeed",
            "strategy: found zero2, for which deepspeed is not installed: "
            "pip install 'poise[deepspeed]'",
        ),
        (
            {"lora": {"rank": 2}},
            "peft",
            "lora: found adapters, for which peft is not installed: pip install 'poise[lora]'",
        ),
    ],
)
def test_a_package_that_is_missing(
    fields: dict[str, object],
    package: str,
    message: str,
    tiny_llama: Path,
    preferences: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Said before anything starts, and by `--plan` too."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == package else found(name)
    )
    with pytest.raises(InputError) as caught:
        describe_plan(align_config(tiny_llama, preferences, **fields))
    assert str(caught.value) == message


def plan_of_merging(folder: Path, **optimizer: Any) -> Plan:
    """What a run on three small files would be known by."""
    for name in ("model", "base", "tuned"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({"a": name}))
    optimizer |= {"name": "onties", "learning_rate": 1e-3, "density": 0.5, "alpha": 0.1}
    config = AlignConfig(model="model", data="rows.jsonl", num_steps=6, optimizer=optimizer)
    return Plan(config, num_parameters=1, num_steps=6, num_tokens=1, table=None, data_key="rows")


# Taken from the version before the names changed, with `auto` and with `reference`.
BEFORE = {
    "auto": "3e8cc3f617abb64fcb7e7a39ffaa2aa3",
    "reference": "8bf9caaae94fb9989ce2f918330ddc56",
}


@pytest.mark.parametrize(("old", "new"), [("auto", "auto"), ("reference", "eager")])
def test_old_names_are_the_same_run(
    old: str,
    new: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both spellings have one fingerprint; a line names the new one; and an unfinished run that the
    version before began, with its own fingerprint and names, goes on.
    """
    monkeypatch.chdir(tmp_path)
    tell_once.cache_clear()
    where = {"base": "base", "tuned": "tuned"}
    plan = plan_of_merging(tmp_path, tau=where, implementation=new)
    assert not capsys.readouterr().err
    renamed = plan_of_merging(tmp_path, reference=where, implementation=old)
    said = ["  optimizer.reference: is called optimizer.tau now"]
    said += ["  optimizer.implementation: reference is called eager now"] * (old != new)
    assert capsys.readouterr().err.splitlines() == said
    assert renamed.config == plan.config
    assert renamed.fingerprint == plan.fingerprint
    run = tmp_path / ".out.partial"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"fingerprint": BEFORE[old]}))
    with _unfinished_run(run, plan, force=False):
        record = json.loads((run / "run.json").read_text())
    assert record["fingerprint"] == plan.fingerprint
    assert record["config"]["optimizer"]["tau"]["base"] == str(tmp_path / "base")
    (tmp_path / "tuned" / "config.json").write_text("{}")
    (run / "run.json").write_text(json.dumps({"fingerprint": BEFORE[old]}))
    changed = plan_of_merging(tmp_path, tau=where | {"tuned": "model"}, implementation=new)
    with (
        pytest.raises(InputError, match="holds an unfinished run"),
        _unfinished_run(run, changed, force=False),
    ):
        pass


def test_names_of_other_tools() -> None:
    """Each is no field here and leads to one; the line of an unknown field names it."""
    for theirs, ours in OTHER_NAMES.items():
        assert theirs not in AlignConfig.model_fields
        section, _, field = ours.rpartition(".")
        assert field in (SECTIONS[section] if section else AlignConfig).model_fields, ours
    fields = {"model": "m", "data": "d", "optimizer": {"learning_rate": 1e-3}}
    for theirs, ours in (("warmup_ratio", "warmup_share"), ("beta", "objective.beta")):
        message = rf"^here: {theirs}: unknown field; allowed: .*; did you mean {ours}\?$"
        with pytest.raises(InputError, match=message):
            check(fields | {theirs: 0.1}, AlignConfig, "here")


def test_a_form_that_fits_says_what_is_wrong() -> None:
    """Of a field with several forms, the line is of the one that was written."""
    schedule = {"name": "cosine", "min_lr_rate": 0.1}
    fields = {"model": "m", "data": "d", "optimizer": {"learning_rate": 1e-3}, "num_steps": 1}
    with pytest.raises(InputError, match=r"min_lr_rate: has no effect on cosine; allowed with"):
        check(fields | {"schedule": schedule}, AlignConfig, "here")
