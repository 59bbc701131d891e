"""Extracted adapters. Oracle: PEFT, which loads and merges them, and the difference in float64."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipelines.checkpoints import open_model
from pipelines.commit import partial_path
from pipelines.errors import InputError
from pipelines.extract import extract
from pipelines.extract.adapter import target_modules
from pipelines.extract.worker import ExtractWorker
from pipelines.merge import MergeConfig, merge
from pipelines.merge.verify import verify
from tests.pipelines.extract.tuned_models import config_of, linear_layers, noise, tune
from tests.tiny_models import save_tiny_gpt2, save_tiny_llama


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def recorded(out: Path) -> dict[str, Any]:
    return json.loads((out / "poise.json").read_text())


def described(out: Path) -> dict[str, Any]:
    return json.loads((out / "adapter_config.json").read_text())


@pytest.mark.parametrize("make", [save_tiny_llama, save_tiny_gpt2])
def test_a_delta_of_low_rank_is_exact(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """The product is the delta to 1e-5, and PEFT makes the tuned model of it."""
    base = make(tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", linear_layers)
    out = extract(config_of(base, tuned, rank=4), tmp_path / "out", strict=True)
    before, after = (load_file(path / "model.safetensors") for path in (base, tuned))
    factors, count = load_file(out / "adapter_model.safetensors"), 0
    for name, values in after.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        delta = values.double() - before[name].double()
        if not delta.any():
            assert f"{module}.lora_A.weight" not in factors
            continue
        a, b = (factors[f"{module}.lora_{part}.weight"].double() for part in "AB")
        product = (b @ a).T if described(out)["fan_in_fan_out"] else b @ a
        assert float((product - delta).norm() / delta.norm()) < 1e-5
        count += 1
    assert 2 * count == len(factors)
    merged = merged_by_peft(base, out)
    for name, values in after.items():
        torch.testing.assert_close(merged[name], values, rtol=0, atol=1e-6)
    record = recorded(out)
    assert record["extracted"]["kept"] > 0.99999
    assert record["extracted"] == record["all_tensors"]
    assert described(out)["r"] == described(out)["lora_alpha"] == 4


def test_what_a_smaller_rank_loses(llama: Path, tmp_path: Path) -> None:
    """PEFT's merged weights are as far from the tuned ones as the record says."""
    tuned = tune(llama, tmp_path / "tuned", linear_layers)
    out = extract(config_of(llama, tuned, rank=2, dtype="bfloat16"), tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (llama, tuned))
    merged, record = merged_by_peft(llama, out), recorded(out)
    assert len(record["modules"]) == 14
    lost = whole = 0.0
    for module, found in record["modules"].items():
        name = f"{module}.weight"
        delta = after[name].double() - before[name].double()
        left = float((merged[name].double() - after[name].double()).norm())
        assert found["delta"] == pytest.approx(float(delta.norm()))
        assert found["error"] == pytest.approx(left / float(delta.norm()), rel=1e-3)
        lost, whole = lost + left**2, whole + float(delta.norm()) ** 2
    assert record["extracted"]["kept"] == pytest.approx((1 - lost / whole) ** 0.5, rel=1e-3)
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }


def test_ranks_by_energy(llama: Path, tmp_path: Path) -> None:
    """Each module has the smallest rank that keeps the share; PEFT reads them from the patterns."""

    def change(name: str, tensor: Tensor) -> Tensor:
        rank = 1 if "q_proj" in name else 6
        return (
            tensor + noise(tensor, rank) if ".layers.1." in name and tensor.dim() == 2 else tensor
        )

    tuned = tune(llama, tmp_path / "tuned", change)
    out = extract(config_of(llama, tuned, energy=0.9), tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (llama, tuned))
    ranks = {name: found["rank"] for name, found in recorded(out)["modules"].items()}
    for module, rank in ranks.items():
        delta = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        squares = torch.linalg.svdvals(delta).square()
        shares = squares.cumsum(0) / squares.sum()
        assert rank == int((shares < 0.9).sum()) + 1
    settings = described(out)
    assert ranks["model.layers.1.self_attn.q_proj"] == 1
    assert settings["r"] == max(ranks.values())
    assert settings["rank_pattern"] == {n: r for n, r in ranks.items() if r != settings["r"]}
    assert settings["alpha_pattern"] == settings["rank_pattern"]
    # Layer 0 has not changed: suffixes would hit it too.
    assert settings["target_modules"] == sorted(ranks)
    merged = merged_by_peft(llama, out)
    for module, found in recorded(out)["modules"].items():
        name = f"{module}.weight"
        left = (merged[name] - after[name]).double().norm() / found["delta"]
        assert float(left) == pytest.approx(found["error"], rel=1e-3, abs=1e-5)
    capped = extract(config_of(llama, tuned, energy=0.9, rank=3), tmp_path / "capped")
    assert all(
        found["rank"] == min(3, ranks[name]) for name, found in recorded(capped)["modules"].items()
    )


def everything(name: str, tensor: Tensor) -> Tensor:
    """Low rank in linear layers; embeddings, head, norms and biases change too."""
    changed = linear_layers(name, tensor)
    return tensor + 0.01 if changed is tensor else changed


@pytest.mark.parametrize(
    ("make", "whole", "left", "saved"),
    [
        (
            save_tiny_llama,
            ["lm_head", "model.norm"],
            {"embeddings": 1, "norms": 4},
            ["lm_head", "model.norm"],
        ),
        (
            save_tiny_gpt2,
            ["ln_f"],
            {"embeddings": 2, "norms": 4},
            ["transformer.ln_f"],
        ),
    ],
)
def test_what_is_saved_whole_and_what_is_left_out(
    make: Callable[[Path], Path],
    whole: list[str],
    left: dict[str, int],
    saved: list[str],
    tmp_path: Path,
) -> None:
    base = make(tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    out = extract(config_of(base, tuned, rank=4, whole=whole), tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (base, tuned))
    record = recorded(out)
    assert {kind: found["tensors"] for kind, found in record["left_out"].items()} == left
    deltas = {n: float((after[n].double() - before[n].double()).norm()) ** 2 for n in after}
    lost = sum(found["share"] ** 2 for found in record["left_out"].values())
    wanted = 1 - lost
    assert record["all_tensors"]["kept"] ** 2 == pytest.approx(wanted, rel=1e-6)
    embeddings = sum(s for n, s in deltas.items() if "embed" in n or ".wte" in n or ".wpe" in n)
    assert record["left_out"]["embeddings"]["share"] ** 2 == pytest.approx(
        embeddings / sum(deltas.values())
    )
    assert described(out)["modules_to_save"] == saved
    merged = merged_by_peft(base, out)
    for name in after:
        if name.rpartition(".")[0] in saved or name.endswith("bias"):
            assert torch.equal(merged[name], after[name])
        elif "embed" in name or "wte" in name or "norm" in name:
            assert torch.equal(merged[name], before[name])
    with pytest.raises(InputError, match=r"strict: found changes .* embeddings \(\d\)"):
        extract(config_of(base, tuned, rank=4), tmp_path / "strict", strict=True)
    with pytest.raises(InputError, match="strict"):
        extract(config_of(base, tuned, rank=4, whole=whole), out, strict=True)
    assert not (tmp_path / "strict").exists()
    assert not partial_path(tmp_path / "strict").exists()


def test_tied_embeddings(tmp_path: Path) -> None:
    """They stay as they are, or are saved whole and stay tied; a merge reads both."""
    base = save_tiny_llama(tmp_path / "base", tied=True)
    tuned = tune(base, tmp_path / "tuned", linear_layers)
    out = extract(config_of(base, tuned, rank=4), tmp_path / "out", strict=True)
    assert described(out)["target_modules"] == sorted(
        f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert all(".lora_" in name for name in load_file(out / "adapter_model.safetensors"))
    changed = tune(base, tmp_path / "changed", everything)
    whole = extract(config_of(base, changed, rank=4, whole=["lm_head"]), tmp_path / "whole")
    assert described(whole)["modules_to_save"] == ["model.embed_tokens"]
    embedding = load_file(changed / "model.safetensors")["model.embed_tokens.weight"]
    merged = merged_by_peft(base, whole)
    source = open_model(f"{base}+{whole}")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name], embedding)
        assert torch.equal(source.read(name, 0, embedding.numel()).view_as(embedding), embedding)


def test_there_and_back(llama: Path, tmp_path: Path) -> None:
    """`poise merge` makes the tuned model of base and adapter; an adapter is compressed as well."""
    tuned = tune(llama, tmp_path / "tuned", linear_layers)
    out = extract(config_of(llama, tuned, rank=4), tmp_path / "out")
    model = {"merge_method": "linear", "models": [{"model": f"{llama}+{out}"}]}
    made = Path(merge(MergeConfig.model_validate(model), tmp_path / "made"))
    after = load_file(tuned / "model.safetensors")
    for name, values in load_file(made / "model.safetensors").items():
        torch.testing.assert_close(values, after[name], rtol=0, atol=1e-6)
    again = extract(config_of(llama, out, rank=4), tmp_path / "again")
    smaller = extract(config_of(llama, f"{llama}+{out}", rank=2), tmp_path / "smaller")
    one, two, three = (load_file(p / "adapter_model.safetensors") for p in (out, again, smaller))
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=1e-3, atol=1e-5)
        kept = three[name] if ".lora_A." in name else three[name].T
        first = values[:2] if ".lora_A." in name else values.T[:2]
        torch.testing.assert_close(kept, first, rtol=1e-3, atol=1e-5)


def test_the_record(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verified, made again, recognised when finished; changes are found."""
    tuned = tune(llama, tmp_path / "tuned", linear_layers)
    config, out = config_of(llama, tuned, rank=3), tmp_path / "out"
    extract(config, out)
    found = verify(out, again=True)
    assert (found.output, found.again) == ("same", True)
    assert found.inputs == {str(llama): "same", str(tuned): "same"}
    assert recorded(out)["kind"] == "extracted"
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"{recorded(out)['extracted']['kept']:.2%} kept" in card
    with monkeypatch.context() as patch:
        patch.delattr("pipelines.extract.run._fill")
        assert extract(config, out) == out
    with pytest.raises(InputError, match="exists already"):
        extract(config_of(llama, tuned, rank=2), out)
    extract(config_of(llama, tuned, rank=2), out, force=True)
    assert described(out)["r"] == 2
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    assert verify(out).inputs == {str(llama): "same", str(tuned): "changed"}


SCRIPT = """
import sys, threading
import pipelines.merge.journal
from pipelines.extract import ExtractConfig, extract
from pipelines.extract.worker import ExtractWorker
pipelines.merge.journal.SYNC_INTERVAL_S = 0.0
plain = ExtractWorker.run
def stopping(self, number):
    if number >= len(self.plan.items) - 5:
        print("here", flush=True)
        threading.Event().wait()
    return plain(self, number)
ExtractWorker.run = stopping
extract(ExtractConfig(base=sys.argv[1], tuned=sys.argv[2], rank=3), sys.argv[3])
"""


def test_killed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on where it was, to the same bytes."""
    tuned = tune(llama, tmp_path / "tuned", linear_layers)
    undisturbed = extract(config_of(llama, tuned, rank=3), tmp_path / "undisturbed")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(llama), str(tuned), str(out)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    done: list[int] = []
    plain = ExtractWorker.run
    monkeypatch.setattr(ExtractWorker, "run", lambda self, n: (done.append(n), plain(self, n))[1])
    extract(config_of(llama, tuned, rank=3), out)
    assert 5 <= len(done) < 10
    assert not partial_path(out).exists()
    files = {file.name: file.read_bytes() for file in undisturbed.iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == files


def test_names_without_the_prefix(tmp_path: Path) -> None:
    """As GPT-2's own checkpoint has them, and with a buffer that today's class does not have."""
    base = save_tiny_gpt2(tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", linear_layers)
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(short, base / "model.safetensors", {"format": "pt"})
    out = extract(config_of(base, tuned, rank=4), tmp_path / "out")
    assert recorded(out)["unmatched"] == [f"h.0.attn.bias: only in {base}"]
    merged, source = merged_by_peft(base, out), open_model(f"{base}+{out}")
    for name, values in load_file(tuned / "model.safetensors").items():
        torch.testing.assert_close(merged[name], values, rtol=0, atol=1e-6)
        read = source.read(name.removeprefix("transformer."), 0, values.numel())
        torch.testing.assert_close(read.view_as(values), values, rtol=0, atol=1e-6)


def test_target_modules_hit_no_others() -> None:
    modules = ["a", "a.x", "b", "b.a", "b.a.x"]
    assert target_modules(["a.x", "b.a.x"], modules) == ["x"]
    assert target_modules(["b.a.x"], modules) == ["b.a.x"]
    assert target_modules(["a.x"], modules) == r"a\.x"
