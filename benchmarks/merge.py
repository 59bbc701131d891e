"""Poise against mergekit on the same checkpoints: wall time, peak memory, bytes per second.

    python benchmarks/merge.py --size 0.15 --mergekit ENV/bin/mergekit-yaml

Makes a base and three fine-tuned models with random weights (bf16, Llama's names and shapes), runs
each tool's command line in turn on the same files (with a warm page cache) and prints a Markdown
table; `--append FILE` appends it to a file. Peak memory is the sum of the proportional set sizes of
all processes of a command, without pages of files. mergekit 0.1.5 needs its own environment.

`--beside CHECKOUT` measures the Poise of another checkout instead, both in turn, `--rounds` times.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
POISE = [sys.executable, "-m", "ray_jobs.cli", "merge"]
SAMPLE_INTERVAL_S = 0.05
METHODS: dict[str, dict[str, object]] = {
    "linear": {"weight": 0.3333},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.3},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.15},
    "breadcrumbs": {"weight": 0.5, "density": 0.5, "gamma": 0.01},
}


@dataclass(frozen=True)
class Run:
    """One command's wall time and processor time in seconds, and its peak memory in bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def shapes(billions: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with about this many billions of parameters."""
    hidden, vocabulary = (512, 32_000) if billions < 0.3 else (1024, 64_000)
    middle = hidden * 11 // 4
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    of_a_layer = sum(torch.Size(shape).numel() for shape in layer.values())
    num_layers = max(1, round((billions * 1e9 - vocabulary * hidden) / of_a_layer))
    names = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for number in range(num_layers):
        names |= {f"model.layers.{number}.{k}.weight": shape for k, shape in layer.items()}
    return names


def make_checkpoints(folder: Path, billions: float) -> list[Path]:
    """A base and three models near it; existing checkpoints are kept."""
    layout = shapes(billions)
    hidden = layout["model.norm.weight"][0]
    paths = [folder / name for name in ("base", "model-1", "model-2", "model-3")]
    generator = torch.Generator()
    for number, path in enumerate(paths):
        if (path / "config.json").is_file():
            continue
        path.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for place, (name, shape) in enumerate(layout.items()):
            values = torch.randn(shape, generator=generator.manual_seed(place)) * 0.02
            if number:
                generator.manual_seed(1000 * number + place)
                values += torch.randn(shape, generator=generator) * 0.002
            tensors[name] = values.to(torch.bfloat16)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 256,
            "num_hidden_layers": sum("input_layernorm" in name for name in layout),
            "vocab_size": layout["model.embed_tokens.weight"][0],
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "bfloat16",
        }
        (path / "config.json").write_text(json.dumps(config))
    return paths


def write_config(file: Path, method: str, paths: list[Path]) -> None:
    """Write one config for both tools."""
    base, *models = paths
    config: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": METHODS[method]} for path in models],
        "dtype": "bfloat16",
    }
    if method != "linear":
        config["base_model"] = str(base)
    file.write_text(yaml.safe_dump(config))


def measure(command: list[str], out: Path, root: Path = ROOT) -> Run:
    """Run a command that writes `out` and sample the memory of its processes.

    Args:
        root: the checkout whose Poise it runs.
    """
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    begin, cpu_before = time.perf_counter(), cpu_of_children()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(own_bytes, family(process.pid))))
        time.sleep(SAMPLE_INTERVAL_S)
    seconds, cpu_seconds = time.perf_counter() - begin, cpu_of_children() - cpu_before
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr.read()}")
    return Run(seconds, cpu_seconds, peak)


def cpu_of_children() -> float:
    """Processor time of all finished children and their children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        except OSError:
            continue
        found += map(int, children.split())
    return found


def own_bytes(pid: int) -> int:
    """Anonymous and shared memory (proportional share) of one process, without pages of files."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return sum(int(sizes.get(name, 0)) for name in ("Pss_Anon", "Pss_Shmem")) * 1024


def warm(paths: list[Path]) -> int:
    """Read all inputs once, as `cat` would; returns their bytes."""
    total = 0
    for path in paths:
        with (path / "model.safetensors").open("rb") as file:
            while block := file.read(1 << 22):
                total += len(block)
    return total


def floor_seconds(paths: list[Path], out: Path) -> float:
    """Time to read the inputs with `cat` and to write the size of one of them with `dd`, synced."""
    out.mkdir(parents=True, exist_ok=True)
    size = (paths[0] / "model.safetensors").stat().st_size
    begin = time.perf_counter()
    files = [str(path / "model.safetensors") for path in paths]
    with Path("/dev/null").open("w") as null:
        subprocess.run(["cat", *files], stdout=null, check=True)
    target = ["dd", "if=/dev/zero", f"of={out}/zeros", "bs=4M", f"count={-(-size // (1 << 22))}"]
    subprocess.run([*target, "conv=fsync"], check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    (out / "zeros").unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=0.15, help="billions of parameters")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-merge"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of another environment")
    parser.add_argument("--beside", type=Path, help="another checkout of Poise")
    parser.add_argument("--rounds", type=int, default=5, help="of the two checkouts")
    parser.add_argument("--append", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    paths = make_checkpoints(arguments.folder / f"{arguments.size}B", arguments.size)
    rows = []
    for method in arguments.methods:
        file, out = arguments.folder / f"{method}.yaml", arguments.folder / "out"
        write_config(file, method, paths)
        used = paths if method != "linear" else paths[1:]
        if arguments.beside is not None:
            warm(used)
            rows.append(compare(method, file, out, arguments.beside, arguments.rounds))
            print(rows[-1], flush=True)
            continue
        num_bytes = warm(used) + (paths[0] / "model.safetensors").stat().st_size
        floor = floor_seconds(used, arguments.folder / "floor")
        ours = measure([*POISE, str(file), str(out)], out)
        theirs = None
        if arguments.mergekit is not None:
            warm(used)
            theirs = measure([str(arguments.mergekit), str(file), str(out)], out)
        rows.append(row(method, ours, theirs, floor, num_bytes))
        print(rows[-1], flush=True)
        shutil.rmtree(out, ignore_errors=True)
    table = "\n".join([*(HEADER if arguments.beside is None else BESIDE), *rows]) + "\n"
    print(table)
    if arguments.append is not None:
        with arguments.append.open("a") as file_:
            file_.write(table)


HEADER = (
    "| method | poise | mergekit | ratio | of processor time | cat + dd | poise, GB/s "
    "| poise, peak | mergekit, peak |",
    "|---|---|---|---|---|---|---|---|---|",
)


BESIDE = (
    "| method | this | other | ratio | processor time: this | other | ratio |",
    "|---|---|---|---|---|---|---|",
)


def compare(method: str, file: Path, out: Path, other: Path, rounds: int) -> str:
    """One line: the medians of this checkout and of another, each with a merge beforehand that is
    not counted.
    """
    roots = (ROOT, other.absolute())
    runs: tuple[list[Run], list[Run]] = ([], [])
    for number in range(rounds + 1):
        for root, found in zip(roots, runs, strict=True):
            run = measure([*POISE, str(file), str(out)], out, root)
            if number:
                found.append(run)
    cells = [method]
    for name in ("seconds", "cpu_seconds"):
        ours, theirs = (statistics.median(getattr(run, name) for run in each) for each in runs)
        cells += [f"{ours:.2f} s", f"{theirs:.2f} s", f"{ours / theirs:.2f}"]
    shutil.rmtree(out, ignore_errors=True)
    return f"| {' | '.join(cells)} |"


def row(method: str, ours: Run, theirs: Run | None, floor: float, num_bytes: int) -> str:
    """One line of the table; `num_bytes` is read (once) plus written."""
    cells = [method, f"{ours.seconds:.1f} s"]
    if theirs is None:
        cells += ["-", "-", f"{ours.cpu_seconds:.1f} s"]
    else:
        cpu_ratio = theirs.cpu_seconds / ours.cpu_seconds
        cells += [f"{theirs.seconds:.1f} s", f"{theirs.seconds / ours.seconds:.1f}x"]
        cells += [f"{theirs.cpu_seconds:.1f} s / {ours.cpu_seconds:.1f} s = {cpu_ratio:.1f}x"]
    cells += [f"{floor:.1f} s", f"{num_bytes / ours.seconds / 1e9:.2f}"]
    cells += [f"{ours.peak_bytes / 2**30:.2f} GiB"]
    cells += ["-" if theirs is None else f"{theirs.peak_bytes / 2**30:.2f} GiB"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
