"""Make the golden files: what mergekit 0.1.5 does with small float32 checkpoints.

    python tests/golden/make.py [FOLDER]

Where mergekit is not installed, a temporary environment is made for it. Written beside this file
(or into FOLDER): `models/` (a base and three tuned tiny Llamas), `merged/NAME.safetensors`
for every `configs/NAME.yaml`, and `defects.json`: mergekit's answers to cases that have a closed
form. Nothing here is random between runs.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
MERGEKIT, TORCH = "mergekit==0.1.5", "torch==2.13.0"
HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 8, 12, 24, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of the tiny Llama."""
    found = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    layer = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def make_models(folder: Path) -> None:
    """A base, and three models whose deltas share a part: every cosine is positive."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(20240717)

    def draw(scale: float) -> dict[str, torch.Tensor]:
        return {n: torch.randn(s, generator=generator) * scale for n, s in shapes().items()}

    base, shared = draw(0.5), draw(0.05)
    models = {"base": base}
    for name in ("one", "two", "three"):
        own = draw(0.05)
        models[name] = {key: base[key] + 2 * shared[key] + own[key] for key in base}
    for name, tensors in models.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def make_coefficients(folder: Path) -> None:
    """Coefficients of all tensors of the three models, near equal weights, as DAM learns them."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(20241008)
    found = {
        name: 1 / 3 + 0.1 * torch.randn(3, shape[-1], generator=generator)
        for name, shape in sorted(shapes().items())
    }
    settings = {
        "models": ["./one", "./two", "./three"],
        "base_model": "./base",
        "embeddings": True,
        "norms": True,
    }
    metadata = {"coefficients": json.dumps(settings)}
    save_file(found, folder / "dam.safetensors", metadata=metadata)


def make_merges(folder: Path) -> None:
    """Run mergekit on every config."""
    from safetensors.torch import load_file, save_file

    (folder / "merged").mkdir(exist_ok=True)
    for config in sorted((HERE / "configs").glob("*.yaml")):
        with tempfile.TemporaryDirectory() as scratch:
            program = str(Path(sys.executable).parent / "mergekit-yaml")
            out = Path(scratch) / "out"
            command = [program, str(config), str(out), "--no-write-model-card"]
            subprocess.run(command, check=True, cwd=folder / "models")
            tensors = {}
            for shard in sorted(out.glob("*.safetensors")):
                tensors |= load_file(shard)
            save_file(tensors, folder / "merged" / f"{config.stem}.safetensors")


def make_defects(folder: Path) -> None:
    """mergekit's answers where the right one is known on paper."""
    import torch
    from mergekit.sparsify import RescaleNorm, della_magprune, rescaled_masked_tensor

    opposed = torch.linalg.cholesky(torch.full((3, 3), -0.4) + 1.4 * torch.eye(3))
    origin = torch.tensor([1.0, 2.0, 3.0])
    small = torch.tensor([[1.0, 0.0], [1.0, 1.0]]) * 1e-4
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(64, generator=generator) * 0.02).bfloat16()
    tuned = [
        (base.float() + torch.randn(64, generator=generator) * 1e-3).bfloat16() for _ in range(3)
    ]
    masks = [torch.tensor(mask) for mask in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))]
    delta = torch.tensor([3.0, 1.0])
    row = torch.linspace(0.001, 1, 4096).bfloat16()
    answers = {
        "model_stock_opposed": run("model_stock", origin, [origin + d for d in opposed]),
        "model_stock_tiny": run("model_stock", torch.zeros(2), list(small)),
        "ties_negative_weight": run(
            "ties", torch.zeros(2), [torch.tensor([1.0, -2.0])], weight=[-1.0]
        ),
        "ties_cancellation": run(
            "ties", torch.zeros(1), [torch.tensor([1.0]), torch.tensor([-1.0])], weight=[1.0, 1.0]
        ),
        "task_arithmetic_bf16": {
            "base": base.float().tolist(),
            "models": [model.float().tolist() for model in tuned],
            "merged": run("task_arithmetic", base, tuned, weight=[0.3, 0.3, 0.3]),
        },
        "dare_l1_mean": torch.stack(
            [rescaled_masked_tensor(delta, mask, RescaleNorm.l1) for mask in masks]
        ).mean(dim=0).tolist(),
        "della_bf16_probabilities": count_probabilities(della_magprune, row),
    }
    text = json.dumps(answers, indent=1) + "\n"
    (folder / "defects.json").write_text(text)


def run(method: str, base, models, **parameters):
    """One tensor through one of mergekit's methods, by its command."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name, tensor in {"base": base, **{f"m{i}": m for i, m in enumerate(models)}}.items():
            (root / name).mkdir()
            tensors = {key: torch_zeros(shape, tensor) for key, shape in shapes().items()}
            norm = tensors["model.norm.weight"] = torch_zeros((len(tensor),), tensor)
            norm[:] = tensor
            save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
            (root / name / "config.json").write_text(json.dumps(CONFIG))
        entries = []
        for i in range(len(models)):
            own = {key: values[i] for key, values in parameters.items()}
            entries.append({"model": f"./m{i}", "parameters": own})
        dtype = str(base.dtype).removeprefix("torch.")
        config = {
            "merge_method": method, "base_model": "./base", "models": entries, "dtype": dtype,
        }
        (root / "config.yaml").write_text(json.dumps(config))
        program = str(Path(sys.executable).parent / "mergekit-yaml")
        command = [program, "config.yaml", "out", "--no-write-model-card"]
        subprocess.run(command, check=True, cwd=root)
        [file] = (root / "out").glob("*.safetensors")
        return load_file(file)["model.norm.weight"].float().tolist()


def torch_zeros(shape, like):
    import torch

    return torch.zeros(shape, dtype=like.dtype)


def count_probabilities(magprune, row) -> int:
    """How many different keep probabilities a row of 4,096 different ranks gets in bf16."""
    from unittest import mock

    import torch

    seen = []
    real = torch.bernoulli
    with mock.patch("torch.bernoulli", lambda p: seen.append(p) or real(p)):
        magprune(row, density=0.5, epsilon=0.15)
    return len(seen[0].unique())


def main() -> None:
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE
    try:
        version = importlib.metadata.version("mergekit")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if f"mergekit=={version}" != MERGEKIT:
        with tempfile.TemporaryDirectory() as scratch:
            venv.create(scratch, with_pip=True)
            python = str(Path(scratch) / "bin" / "python")
            subprocess.run([python, "-m", "pip", "install", "-q", TORCH], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", MERGEKIT], check=True)
            subprocess.run([python, __file__, str(folder)], check=True)
        return
    shutil.rmtree(folder / "models", ignore_errors=True)
    shutil.rmtree(folder / "merged", ignore_errors=True)
    make_models(folder / "models")
    make_coefficients(folder / "models")
    make_merges(folder)
    make_defects(folder)


if __name__ == "__main__":
    main()
