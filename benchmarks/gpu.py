"""What a GPU does: kernels, optimizer steps, training memory, engine, merges.

    python benchmarks/gpu.py [--only PART ...] [--small]

Each part runs in a process of its own and prints Markdown; a part that fails says why, and the
others go on. Needs one GPU, but no Ray. `--small` takes tiny shapes, to try the script on a CPU.

- `kernels`: Triton's passes beside the eager ones after six steps: elements that differ.
- `steps`: milliseconds of an optimizer step beside torch's fused AdamW, and bytes of state.
- `memory`: DPO with a Llama of 1.2B parameters and 128,256 words on pairs of 4,096 tokens: peak
  memory beside the formula, seconds a step, the losses.
- `engine`: start, swap, generation and log-likelihoods of the transformers engine in bf16, and the
  answers of the GPU beside the CPU's.
- `merge`: methods on whole matrices on the GPU beside the CPU.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ONLINE = {
    "OnDARE, p = 0.5": {"consensus": "dare", "density": 0.5},
    "OnTIES, p = 0.5": {"consensus": "ties", "density": 0.5},
    "OnTIES, p = 0.1": {"consensus": "ties", "density": 0.1},
    "OnDARE, p = 0.5, K = 3": {"consensus": "dare", "density": 0.5, "merge_every": 3},
}
LLAMA = {  # of 1.24B parameters, as Llama 3.2 1B
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
SMALL = LLAMA | {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of some work, waiting for the GPU before and after."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def parameters_of(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    """Named random parameters on the device."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        (name, nn.Parameter(0.02 * torch.randn(shape, generator=generator, device=DEVICE)))
        for name, shape in shapes.items()
    ]


def tau_of(named: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """A random tau in bf16."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    return {
        name: (1e-3 * torch.randn(p.shape, generator=generator, device=DEVICE)).bfloat16()
        for name, p in named
    }


def kernels(small: bool) -> None:
    """Triton beside eager on the same device."""
    from operators.optim import OnlineMergingAdamW

    shapes = {"a": (1000, 1037), "b": (513, 77), "c": (31,)}
    print("| options | elements that differ by more than 1e-6 | of | largest difference |")
    print("|---|---|---|---|")
    for name, options in ONLINE.items():
        found = []
        for implementation in ("eager", "eager" if DEVICE == "cpu" else "triton"):
            named = parameters_of(shapes)
            optimizer = OnlineMergingAdamW(
                named,
                tau_of(named),
                lr=1e-2,
                eps=0.5,  # without it all first updates have one size, and a cut is a draw
                alpha=0.1,
                implementation=implementation,
                **options,
            )
            generator = torch.Generator(DEVICE).manual_seed(2)
            for _ in range(6):
                for _, p in named:
                    p.grad = torch.randn(p.shape, generator=generator, device=DEVICE)
                optimizer.step()
            found.append(torch.cat([p.detach().flatten() for _, p in named]))
        apart = (found[0] - found[1]).abs()
        cells = [f"{int((apart > 1e-6).sum())}", f"{apart.numel():,}", f"{float(apart.max()):.1e}"]
        print(f"| {name} | {' | '.join(cells)} |")


def steps(small: bool) -> None:
    """Times of a step at 0.5B and 1.2B parameters."""
    from benchmarks.optimizers import shapes, state_bytes
    from operators.optim import OnlineMergingAdamW

    for size in ["4M"] if small else ["68M", "500M"]:
        named = parameters_of(shapes(size))
        tau = tau_of(named)
        parameters = [p for _, p in named]
        count = sum(p.numel() for p in parameters)
        generator = torch.Generator(DEVICE).manual_seed(3)
        sets = [
            [1e-3 * torch.randn(p.shape, generator=generator, device=DEVICE) for p in parameters]
            for _ in range(2)
        ]
        print(
            f"\n| {count / 1e6:.0f}M float32 parameters | first step, ms | a step after 20, ms "
            "| of fused AdamW | bytes of state a parameter |\n|---|---|---|---|---|"
        )
        fused_ms = 0.0
        makers: dict[str, Callable[[], Any]] = {
            "AdamW fused": lambda p=parameters: torch.optim.AdamW(p, lr=1e-6, fused=True)
        }
        for name, options in ONLINE.items():
            makers[name] = lambda options=options, named=named, tau=tau: OnlineMergingAdamW(
                named, tau, lr=1e-6, alpha=1e-7, **options
            )
        if size != "500M":
            makers["OnDARE, eager"] = lambda named=named, tau=tau: OnlineMergingAdamW(
                named, tau, lr=1e-6, alpha=1e-7, density=0.5, implementation="eager"
            )
        for name, make in makers.items():
            optimizer = make()
            times = []
            for step in range(12 if "eager" in name else 31):
                for p, gradient in zip(parameters, sets[step % 2], strict=True):
                    p.grad = gradient
                times.append(1e3 * seconds_of(optimizer.step))
            best = sorted(times[-10:])[5]
            fused_ms = fused_ms or best
            state = state_bytes(optimizer) / count
            print(f"| {name} | {times[0]:.1f} | {best:.2f} | {best / fused_ms:.2f} | {state:.2f} |")
            del optimizer


def save_model(folder: Path, shape: dict[str, Any], seed: int, context: int) -> None:
    """A random Llama in bf16 with a tokenizer of numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(**shape, max_position_embeddings=context, dtype="bfloat16")
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).bfloat16()
    model.cpu().save_pretrained(folder)
    # A special text among the numbers would split the words that contain it.
    words = {"</s>" if n == 1 else str(n): n for n in range(shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


ONDARE = {"name": "ondare", "learning_rate": 1e-6, "density": 0.5, "alpha": 1e-3}
MEMORY: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "whole logits": {"logits_chunk": 1 << 20},
    "flex_attention": {"attention": "flex_attention"},
    "fsdp2, OnDARE": {"strategy": "fsdp2", "optimizer": ONDARE},
    "reference on the fly": {"reference_log_probabilities": "on_the_fly"},
    "no gradient checkpointing": {"gradient_checkpointing": False},
    "activations in host memory": {"gradient_checkpointing": False, "activation_offload": True},
    "fsdp2, offloaded optimizer": {"strategy": "fsdp2", "cpu_offload": True},
    "eager": {"attention": "eager"},
}


def memory(small: bool) -> None:
    """DPO of one pair a micro-batch, each setting in a process of its own."""
    length = 64 if small else 4096
    shape = SMALL if small else LLAMA
    print("| setting | peak, GB | formula, GB | ratio | seconds a step | losses |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for seed, name in enumerate(("base", "model")):
            save_model(folder / name, shape, seed, length)
        random = torch.Generator().manual_seed(4)
        rows = []
        for _ in range(4):
            numbers = torch.randint(2, shape["vocab_size"], (3 * length // 2,), generator=random)
            words = list(map(str, numbers.tolist()))
            half = length // 2
            parts = [words[:half], words[half : length - 1], words[length : length + half - 1]]
            prompt, chosen, rejected = (" ".join(part) for part in parts)
            rows.append({"prompt": prompt + " ", "chosen": chosen, "rejected": rejected})
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in MEMORY:
            command = [sys.executable, "-m", "benchmarks.gpu", "--setting", name, place]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=90)
            said = ended.stdout.strip() or (ended.stderr.strip() or "?").splitlines()[-1]
            print(f"| {name} | {said} |", flush=True)


def setting(name: str, folder: Path) -> None:
    """Train one setting in this process and print its cells."""
    import torch.distributed as dist

    from pipelines.train import AlignConfig, plan_alignment
    from pipelines.train.loop import train_worker
    from pipelines.train.memory import estimate_memory, shape_of
    from pipelines.train.metrics import peak_memory
    from pipelines.train.run import worker_settings

    fields: dict[str, Any] = {
        "model": folder / "model",
        "data": folder / "rows.jsonl",
        "objective": {"name": "dpo", "beta": 0.1},
        "optimizer": {"learning_rate": 1e-6},
        "num_steps": 4,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "strategy": "single",
        "num_workers": 1,
        "precision": "bf16",
        "max_length": 4096,
        "gradient_checkpointing": True,
        "checkpoint_every": 10**6,
    } | MEMORY[name]
    if "density" in fields["optimizer"]:
        tau = {"base": folder / "base", "tuned": folder / "model"}
        fields["optimizer"] = fields["optimizer"] | {"tau": tau}
    config = AlignConfig(**fields)
    with tempfile.TemporaryDirectory() as place, socket.socket() as port:
        run = Path(place) / "run"
        run.mkdir()
        plan = plan_alignment(config, Path(place) / "cache")
        settings = worker_settings(config, plan, run, Path(place))
        port.bind(("127.0.0.1", 0))
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
        port.close()
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=0, world_size=1)
        train_worker({"runs": [settings | {"num_threads": 4}]})
        failure = run / "failure.json"
        if failure.is_file():
            raise RuntimeError(failure.read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        dist.destroy_process_group()
    held = peak_memory()
    length = 64 if DEVICE == "cpu" else 4096
    expected = estimate_memory(shape_of(config.model, config.head), config, length).total
    losses = ", ".join(f"{line['loss']:.5f}" for line in lines)
    took = min(line["seconds"] for line in lines[1:-1])
    cells = [f"{held / 1e9:.2f}", f"{expected / 1e9:.2f}", f"{held / expected:.2f}"]
    print(" | ".join([*cells, f"{took:.2f}", losses]))


def engine(small: bool) -> None:
    """The transformers engine, in bf16 on 1.2B parameters and in float32 beside the CPU."""
    from pipelines.engines import EngineConfig, Sampling, open_engine

    shape = SMALL if small else LLAMA
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for seed in range(2):
            save_model(folder / f"m{seed}", shape, seed, 2048)
        random = torch.Generator().manual_seed(5)
        texts = [
            " ".join(map(str, torch.randint(2, 1000, (200,), generator=random).tolist()))
            for _ in range(64 if small else 256)
        ]
        opened: list[Any] = []
        start = seconds_of(lambda: opened.append(open_engine(folder / "m0", EngineConfig())))
        own = opened[0]
        print(f"- start {start:.2f} s, weights {own.weights[:12]}")
        swaps = [seconds_of(lambda m=m: own.swap(folder / m)) for m in ("m1", "m0", "m1")]
        print(f"- swaps {', '.join(f'{each:.2f} s' for each in swaps)}", flush=True)
        sampling = Sampling(max_tokens=16 if small else 128)
        own.generate(texts[:8], sampling)
        took = seconds_of(lambda: own.generate(texts, sampling))
        tokens = len(texts) * sampling.max_tokens
        print(f"- greedy: {len(texts)} prompts, {tokens / took:,.0f} tokens a second or fewer")
        took = seconds_of(lambda: own.log_likelihoods(texts, texts[::-1]))
        tokens = 2 * sum(len(text.split()) for text in texts)
        print(
            f"- log-likelihoods: {tokens:,} tokens in {took:.2f} s, {tokens / took:,.0f} a second"
        )
        own.close()
        save_model(folder / "little", SMALL, 0, 2048)
        both = []
        for device in ("cpu", DEVICE):
            one = open_engine(folder / "little", EngineConfig(dtype="float32", device=device))
            likely = one.log_likelihoods(texts[:16], texts[16:32])
            answers = one.generate(texts[:16], Sampling(max_tokens=32))
            tokens_of = [answer.tokens for answer in answers]
            both.append((one.weights, [each.value for each in likely], tokens_of))
            one.close()
        same = sum(a == b for a, b in zip(both[0][2], both[1][2], strict=True))
        print(f"- digests equal: {both[0][0] == both[1][0]}; greedy answers equal: {same} of 16")
        pairs = zip(both[0][1], both[1][1], strict=True)
        apart = max(abs(a - b) for a, b in pairs)
        print(f"- log-likelihoods of GPU and CPU in float32: largest difference {apart:.1e}")


def merge(small: bool) -> None:
    """TSVM of three deltas on the CPU and on the GPU, whole `poise merge`s."""
    import safetensors.torch
    import yaml

    shape = SMALL if small else LLAMA | {"num_hidden_layers": 2, "vocab_size": 4096}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for seed in range(4):
            save_model(folder / f"m{seed}", shape, seed, 512)
        outputs = []
        print("| method | CPU, s | GPU, s | ratio | relative difference |\n|---|---|---|---|---|")
        for method in ("tsvm", "r_tsvm"):
            times = []
            for device in ("cpu", DEVICE):
                config = {
                    "merge_method": method,
                    "base_model": str(folder / "m0"),
                    "models": [{"model": str(folder / f"m{n}")} for n in (1, 2, 3)],
                    "executor": "local",
                    "device": device,
                    "out_dtype": "float32",
                    "memory_budget": "8GiB",
                }
                path = folder / f"{method}-{device}.yaml"
                path.write_text(yaml.safe_dump(config))
                out = folder / f"{method}-{device}"
                own = [sys.executable, "-m", "ray_jobs.cli", "merge"]
                command = [*own, str(path), "--out", str(out)]
                start = time.perf_counter()
                ended = subprocess.run(command, capture_output=True, text=True)
                times.append(time.perf_counter() - start)
                if ended.returncode:
                    print(ended.stdout[-500:], ended.stderr[-500:])
                    return
                tensors: dict[str, Tensor] = {}
                for file in out.glob("*.safetensors"):
                    tensors |= safetensors.torch.load_file(file)
                outputs.append(tensors)
            first, second = outputs[-2:]
            apart = sum(float((first[n] - second[n]).double().pow(2).sum()) for n in first) ** 0.5
            whole = sum(float(first[n].double().pow(2).sum()) for n in first) ** 0.5
            cells = [f"{each:.1f}" for each in (*times, times[0] / times[1])]
            print(f"| {method} | {' | '.join(cells)} | {apart / whole:.1e} |", flush=True)


PARTS = {"kernels": kernels, "steps": steps, "memory": memory, "engine": engine, "merge": merge}


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--setting", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from ray_jobs.session import quiet_environment

    quiet_environment()
    if arguments.setting:
        return setting(arguments.setting[0], Path(arguments.setting[1]))
    if arguments.part:
        return PARTS[arguments.part](arguments.small)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"
    print(f"torch {torch.__version__}, {name}")
    for part in arguments.only or PARTS:
        print(f"\n### {part}\n", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", part]
        try:
            subprocess.run(command + ["--small"] * arguments.small, check=True, timeout=400)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            traceback.print_exc(limit=0)
        print(f"({part}: {time.perf_counter() - start:.0f} s)", flush=True)
    return None


if __name__ == "__main__":
    main()
