"""What the output's dtype keeps of a merge's change: record, card and lines.

Oracle: the files themselves. The same merge in float32 gives what was computed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from operators.kernels.merging import MergingKernels
from pipelines.merge import MergeConfig, merge
from pipelines.merge.card import rounding_of_merge
from pipelines.merge.diff import diff_models
from pipelines.merge.verify import verify
from pipelines.provenance import read_record
from pipelines.rounding import rounding_lines
from ray_jobs.merge import run_merge
from tests.pipelines.merge.conftest import Family, fine_tune, make_family, save_weights, weights_of
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """bf16 models one spacing from their base here and there, as short alignments leave them."""
    family = make_family(tmp_path_factory.mktemp("near"), torch.bfloat16)
    for seed, model in enumerate(family.models):
        generator = torch.Generator().manual_seed(seed)
        tensors = weights_of(family.base)
        for values in tensors.values():
            step = torch.randn(values.shape, generator=generator) * 0.004
            values.copy_(values.float() * (1 + step))
        save_weights(model, tensors)
    return family


def merged(config: dict[str, Any], out: Path, **fields: Any) -> dict[str, Any]:
    """The record of a merge."""
    merge(MergeConfig.model_validate(config | fields), out)
    record = read_record(out)
    assert record is not None
    return record


def by_hand(exact: Path, written: Path, origin: Path) -> dict[str, float]:
    """The numbers of a record, from three checkpoints in float64."""
    before, computed, stored = map(weights_of, (origin, exact, written))
    names = [n for n in computed if not torch.equal(computed[n].double(), before[n].double())]
    e = np.concatenate([(computed[n].double() - before[n].double()).ravel() for n in names])
    w = np.concatenate([(stored[n].double() - before[n].double()).ravel() for n in names])
    sizes = np.linalg.norm(e), np.linalg.norm(w)
    norm, cosine = sizes[1] / sizes[0], e @ w / sizes[0] / sizes[1]
    return {
        "norm": norm,
        "cosine": cosine,
        "kept": max(0.0, min(norm, 1 / norm, cosine)),
        "exact_norm": sizes[0],
        "written_norm": sizes[1],
        "num_exact": np.count_nonzero(e),
        "num_written": np.count_nonzero(w),
    }


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("task_arithmetic", {"weight": 0.3}),
    ("ties", {"density": 0.5}),
    ("dare_linear", {"density": 0.5, "weight": 0.4}),
    ("tsvm", {}),
]


@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=[name for name, _ in METHODS])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_record_against_the_files(
    near: Family, tmp_path: Path, method: str, parameters: dict[str, Any], dtype: str
) -> None:
    config = near.config(method, parameters=parameters)
    record = merged(config, tmp_path / "written", out_dtype=dtype)["rounding"]
    whole = merged(config, tmp_path / "exact", out_dtype="float32")["rounding"]
    origin = near.models[0] if method == "linear" else near.base
    expected = by_hand(tmp_path / "exact", tmp_path / "written", origin)
    assert {name: record[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert record["dtype"] == dtype
    assert record["origin"].startswith(str(origin))
    assert (whole["kept"], whole["norm"], whole["exact_norm"]) == (1.0, 1.0, None)


def test_workers_pieces_and_kernels_do_not_matter(
    near: Family, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads, Ray's actors and compiled passes give the same sums."""
    monkeypatch.setattr("pipelines.merge.plan.PIECE_ELEMENTS", 500)
    monkeypatch.setattr("pipelines.merge.tensor.CHUNK_ELEMENTS", 100)
    config = near.config("task_arithmetic", parameters={"weight": 0.3})
    one = merged(config, tmp_path / "one", num_workers=1)["rounding"]
    assert merged(config, tmp_path / "four", num_workers=4)["rounding"] == one
    out = tmp_path / "ray"
    merge(MergeConfig.model_validate(config), out, executor="ray")
    found = read_record(out)
    assert found is not None
    assert found["rounding"] == one
    assert verify(out, again=True).again
    kernels = MergingKernels()
    monkeypatch.setattr("pipelines.merge.tensor.merging_kernels", lambda count: kernels)
    assert merged(config, tmp_path / "compiled")["rounding"] == one


def test_a_small_change_warns_and_names_the_field(
    near: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "merge.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(near.config("task_arithmetic", parameters={"weight": 0.05})))
    run_merge(file, str(out), ["executor=local"], plan=False, force=False)
    lines = capfd.readouterr().err.splitlines()
    told = [line for line in lines if line.startswith("rounding: ")]
    assert any("warning: bfloat16 keeps less than 95%" in line for line in lines)
    assert any("out_dtype: float32" in line for line in lines)
    assert len(told) == 1
    assert told[0] in (out / "README.md").read_text()
    run_merge(file, str(out), ["out_dtype=float32", "executor=local"], plan=False, force=True)
    lines = capfd.readouterr().err.splitlines()
    assert f"rounding: float32 keeps all of the change from {near.base}" in lines
    assert not any("warning" in line for line in lines)


def test_nothing_is_said_of_rounding_where_nothing_is_rounded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From float32 to float32; record and card say it."""
    family = make_family(tmp_path / "models", torch.float32)
    file, out = tmp_path / "merge.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(family.config("linear", parameters={"weight": 1})))
    run_merge(file, str(out), ["executor=local"], plan=False, force=False)
    assert "rounding" not in capfd.readouterr().err
    record = read_record(out)
    assert record is not None
    [line] = rounding_lines(record, "")
    assert "float32 keeps all of the change from" in line
    assert line in (out / "README.md").read_text()


def test_copies_count_nothing(near: Family, tmp_path: Path) -> None:
    config = {"merge_method": "passthrough", "models": [{"model": str(near.models[0])}]}
    record = merged(config, tmp_path / "copy")
    assert record["rounding"]["kept"] == 1.0
    assert record["rounding"]["exact_norm"] is None
    unchanged = near.config("task_arithmetic", parameters={"weight": 0.0})
    record = merged(unchanged, tmp_path / "same")
    assert record["rounding"]["exact_norm"] == 0
    assert "no rounded weight differs" in rounding_lines(record, "out_dtype: float32")[0]


def test_a_merged_adapter_is_measured_from_its_checkpoint(tmp_path: Path) -> None:
    """The written model's change is that of the adapter, computed here from its factors."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = save_tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    for name, values in model.named_parameters():
        if "lora_B" in name:
            values.data.mul_(0.01)
    model.save_pretrained(tmp_path / "adapter")
    name = f"{base}+{tmp_path / 'adapter'}"
    config = {"merge_method": "passthrough", "models": [{"model": name}]}
    found = merged(config, tmp_path / "written")["rounding"]
    whole = model.merge_and_unload()
    whole.save_pretrained(tmp_path / "exact")
    expected = by_hand(tmp_path / "exact", tmp_path / "written", base)
    expected.pop("num_exact")  # float32 sums may differ in their last bit
    assert {n: found[n] for n in expected} == pytest.approx(expected, rel=1e-3)


def test_records_and_journals_of_older_versions(near: Family, tmp_path: Path) -> None:
    from pipelines.merge import plan_merge

    config = MergeConfig.model_validate(near.config())
    assert rounding_of_merge(plan_merge(config), [{"item": 0, "digests": []}]) is None
    assert rounding_lines({"kind": "merged"}, "") == rounding_lines({"rounding": None}, "") == []


def test_diff_tells_what_a_dtype_can_hold(near: Family, tmp_path: Path) -> None:
    """Large steps are kept by bfloat16; of steps below its spacing, nothing is sure."""
    large = diff_models(str(near.base), str(fine_tune(near.base, tmp_path / "large", 7)))[-1]
    assert large.kept is not None
    assert large.kept > 0.99
    small = diff_models(str(near.base), str(near.models[0]))[-1]
    assert small.kept is not None
    assert small.kept < 0.95
    merged(near.config(), tmp_path / "exact", out_dtype="float32")
    assert diff_models(str(near.base), str(tmp_path / "exact"))[-1].kept is None
