"""Peak memory does not grow with the model.

Oracle: the system's count of the process's own memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

# Prints what the merge added to the process's own memory (without pages of files), in bytes.
SCRIPT = """
import sys, threading, time
from pathlib import Path
from pipelines.merge import load_merge_config, merge

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

config, before, peak, done = load_merge_config(sys.argv[1]), own(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, own())
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
merge(config, sys.argv[2])
done = True
watcher.join()
print(peak - before)
"""


def make(folder: Path, rows: int) -> Path:
    """A checkpoint of one large matrix."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(str(folder)))
    values = torch.randn(rows, 2048, generator=generator).to(torch.bfloat16)
    save_file({"model.layers.0.weight": values}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    return folder


def added_bytes(folder: Path, rows: int, method: str) -> int:
    base, one, two = (make(folder / f"{name}{rows}", rows) for name in ("base", "one", "twoo"))
    config = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(one)}, {"model": str(two)}],
        "parameters": {"density": 0.3},
        "memory_budget": "256MiB",
    }
    file = folder / f"{rows}.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", SCRIPT, str(file), str(folder / f"out{rows}")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare_ties", "ties"])
def test_a_model_four_times_as_large(tmp_path: Path, method: str) -> None:
    small = added_bytes(tmp_path, 4096, method)
    large = added_bytes(tmp_path, 16384, method)
    assert large < 256 * 2**20
    assert large < small + 64 * 2**20
