"""Models from checkpoints of runs that are not finished.

Oracle: the model that the finished run writes itself.
"""

import itertools
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_workers_in_turn
from safetensors.torch import load_file
from training_files import align_config, run_here
from transformers import AutoModelForCausalLM

from pipelines.checkpoints import CheckpointDelta
from pipelines.errors import InputError
from pipelines.merge.verify import verify
from pipelines.rounding import rounding_lines
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.export_run import export_checkpoint
from pipelines.train.files import EXPORTED_FILE
from pipelines.train.material import material
from pipelines.train.run import _unfinished_run
from tests.tiny_models import save_tiny_llama


def unfinished(config: AlignConfig, out: Path) -> Path:
    """A run whose workers are done and whose output was not put into place."""
    folder = out.with_name(f".{out.name}.partial")
    with _unfinished_run(folder, plan_alignment(config, out.parent / "cache"), force=False):
        run_here(config, folder)
    return folder


def merging_optimizer(name: str, base: Path, tuned: Path, *, merge_every: int) -> dict[str, Any]:
    """The config of step-K."""
    return {
        "name": name,
        "learning_rate": 1e-3,
        "density": 0.5,
        "alpha": 1e-2,
        "merge_every": merge_every,
        "tau": {"base": base, "tuned": tuned},
    }


def test_export_gives_what_the_run_would(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """The last checkpoint's export equals the run's own output; earlier steps differ."""
    folder = unfinished(align_config(tiny_llama, preferences), tmp_path / "run")
    last = export_checkpoint(tmp_path / "run", tmp_path / "last")
    name = "model.safetensors"
    assert (last / name).read_bytes() == (folder / "model" / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(last).config.architectures == ["LlamaForCausalLM"]
    assert json.loads((last / "poise.json").read_text())["step"] == 6
    early = export_checkpoint(folder, tmp_path / "early", step=4)
    assert (early / name).read_bytes() != (last / name).read_bytes()
    with pytest.raises(InputError, match=r"step: found 5; allowed: 4, 6"):
        export_checkpoint(folder, tmp_path / "other", step=5)
    with pytest.raises(InputError, match="exists already"):
        export_checkpoint(folder, tmp_path / "early")
    with pytest.raises(InputError, match="holds no unfinished run"):
        export_checkpoint(tmp_path / "last", tmp_path / "other")


def test_all_files_of_the_model_travel(preferences: Path, tmp_path: Path) -> None:
    """In subfolders too; pickles and links that lead elsewhere do not."""
    model = save_tiny_llama(tmp_path / "model")
    (model / "1_Pooling").mkdir()
    for place in ("modeling_own.py", "LICENSE", "1_Pooling/config.json", "optimizer.bin"):
        (model / place).write_text("{}")
    unfinished(align_config(model, preferences), tmp_path / "run")
    out = export_checkpoint(tmp_path / "run", tmp_path / "out")
    for place in ("modeling_own.py", "LICENSE", "1_Pooling/config.json", "tokenizer.json"):
        assert (out / place).read_bytes() == (model / place).read_bytes()
    assert not (out / "optimizer.bin").exists()
    assert verify(out).output == "same"
    (model / "key.txt").symlink_to(preferences)
    with pytest.raises(InputError, match=r"key\.txt: is a link to .*; allowed: links to files of "):
        plan_alignment(align_config(model, preferences), tmp_path / "cache")


def test_export_merges_what_is_pending(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """Between two merges of step-K the export is what a run that ended there would give."""
    base = save_tiny_llama(tmp_path / "base", seed=9)
    optimizer = merging_optimizer("ondare", base, tiny_llama, merge_every=4)
    fields: dict[str, Any] = {"optimizer": optimizer, "schedule": "constant"}
    unfinished(align_config(tiny_llama, preferences, **fields), tmp_path / "long")
    short = align_config(tiny_llama, preferences, **fields, num_steps=6)
    folder = run_here(short, tmp_path / "short")
    export = export_checkpoint(tmp_path / "long", tmp_path / "out", step=6)
    found, expected = (load_file(path / "model.safetensors") for path in (export, folder / "model"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_export_of_zero(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """DeepSpeed's checkpoint files give the weights of the run's own output, also between two
    merges of step-K.
    """
    base = save_tiny_llama(tmp_path / "base", seed=9)
    configs: dict[Path, AlignConfig] = {}
    for strategy, merge_every in itertools.product(("zero1", "zero2", "zero3"), (1, 4)):
        optimizer = merging_optimizer("onties", base, tiny_llama, merge_every=merge_every)
        fields: dict[str, Any] = {"precision": "bf16", "optimizer": optimizer}
        config = align_config(tiny_llama, preferences, strategy=strategy, num_workers=2, **fields)
        configs[tmp_path / f".{strategy}-{merge_every}.partial"] = config
    with ExitStack() as stack:
        for folder, config in configs.items():
            plan = plan_alignment(config, tmp_path / "cache")
            stack.enter_context(_unfinished_run(folder, plan, force=False))
        run_workers_in_turn(configs)
    name = "model.safetensors"
    for folder in configs:
        run = folder.name.removeprefix(".").removesuffix(".partial")
        export = export_checkpoint(tmp_path / run, tmp_path / f"out-{run}")
        assert (export / name).read_bytes() == (folder / "model" / name).read_bytes(), run


def test_small_changes_and_save_dtype(preferences: Path, tmp_path: Path) -> None:
    """bfloat16 loses most of a short alignment; float32 keeps it, beside the same bf16 model.

    Oracle: the float32 export holds what was computed.
    """
    model = save_tiny_llama(tmp_path / "model", dtype=torch.bfloat16)
    optimizer = {"learning_rate": 1e-6}
    folder = unfinished(align_config(model, preferences, optimizer=optimizer), tmp_path / "run")
    exported = json.loads((folder / EXPORTED_FILE).read_text())["rounding"]
    source, whole = (
        export_checkpoint(folder, tmp_path / dtype, dtype=dtype) for dtype in ("source", "float32")
    )
    before, small, large = (
        load_file(path / "model.safetensors") for path in (model, source, whole)
    )
    e = torch.cat([(large[n].double() - before[n].double()).view(-1) for n in before])
    w = torch.cat([(small[n].double() - before[n].double()).view(-1) for n in before])
    record = json.loads((source / "poise.json").read_text())
    found = record["rounding"]
    assert found == exported
    assert found["norm"] == pytest.approx(float(w.norm() / e.norm()), rel=1e-6)
    assert found["cosine"] == pytest.approx(float(e @ w / w.norm() / e.norm()), rel=1e-6)
    assert found["origin"] == str(model)
    line, warning = rounding_lines(record, "save.dtype: float32")
    assert line in (source / "README.md").read_text()
    assert "save.dtype: float32 keeps all" in warning
    assert {values.dtype for values in large.values()} == {torch.float32}
    assert json.loads((whole / "config.json").read_text())["dtype"] == "float32"
    assert (source / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert len(rounding_lines(json.loads((whole / "poise.json").read_text()), "")) == 1
    assert AutoModelForCausalLM.from_pretrained(whole, dtype="auto").dtype == torch.float32
    tau = CheckpointDelta(model, whole).read("lm_head.weight", 0, 64)
    expected = (
        large["lm_head.weight"].view(-1)[:64] - before["lm_head.weight"].float().view(-1)[:64]
    )
    assert torch.equal(tau, expected)


def test_save_dtype_in_fingerprints(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """Runs of versions without `save` are the same runs; another dtype is another result."""
    config = align_config(tiny_llama, preferences)
    assert "save" not in material(config)
    narrow = align_config(tiny_llama, preferences, save={"dtype": "bfloat16"})
    assert material(narrow)["save"] == {"dtype": "bfloat16"}
    folder = unfinished(narrow, tmp_path / "run")
    written = load_file(folder / "model" / "model.safetensors")
    assert {values.dtype for values in written.values()} == {torch.bfloat16}
    exported = json.loads((folder / EXPORTED_FILE).read_text())["rounding"]
    assert exported["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="source"):
        align_config(tiny_llama, preferences, save={"dtype": "float16"})
