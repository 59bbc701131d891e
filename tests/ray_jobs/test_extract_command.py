"""`poise extract-lora` as a user sees it. Oracle: the record that it writes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ray_jobs.command_line import poise
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and one whose every tensor has changed at random."""
    folder = tmp_path_factory.mktemp("models")
    base, tuned = (save_tiny_llama(folder / name) for name in ("base", "tuned"))
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(tuned / "model.safetensors")
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.01)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    return base, tuned


def test_what_it_says(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    out, given = tmp_path / "out", ("extract-lora", *models, "--rank", 4)
    assert poise(monkeypatch, *given, "--whole", "lm_head", "--out", out) == 0
    captured = capfd.readouterr()
    record = json.loads((out / "poise.json").read_text())
    kept = record["extracted"]["kept"]
    assert kept < 0.9
    assert "the 10 modules that keep least" in captured.out
    assert "all 14 modules" in captured.out
    assert f"{kept:.2%}" in captured.out
    assert f"{record['all_tensors']['kept']:.2%}" in captured.out
    shares = {kind: f"{found['share']:.2%}" for kind, found in record["left_out"].items()}
    assert captured.err.splitlines() == [
        f"warning: embeddings: 1 changed (embed_tokens), left out: {shares['embeddings']} of the "
        "delta's norm; --whole embed_tokens saves a module as it is",
        "warning: norms: 5 changed (input_layernorm, norm, post_attention_layernorm), left out: "
        f"{shares['norms']} of the delta's norm; --whole MODULE saves a module as it is",
        f"warning: the factors keep {kept:.2%} of the norm of the linear layers' delta; a larger "
        "--rank (or --energy) keeps more",
        f"extracted adapter: {out}",
    ]
    assert poise(monkeypatch, "verify", out, "--again") == 0
    assert "same     made again" in capfd.readouterr().out


def test_strict_writes_nothing(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    given = ("extract-lora", *models, "--energy", 0.9, "--strict", "--out", tmp_path / "out")
    assert poise(monkeypatch, *given) == 2
    assert capfd.readouterr().err == (
        "poise: strict: found changes that the adapter leaves out: head (1), embeddings (1), "
        "norms (5); allowed: none, or modules named by --whole\n"
    )
    assert list(tmp_path.iterdir()) == []
