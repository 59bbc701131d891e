"""Learning rates at which optimizers make one length of update, for docs/optimizers.md.

    python benchmarks/matched_rates.py runs/demo

Trains the mixture of a finished demo again with AdamW, at the demo's rate, and with each setting
below: at a first guess, then at the rate that its delta's norm suggests. Prints a Markdown table:
the second rate and the norm at it, both over AdamW's. Norms grow a little slower than rates, by
about the power `POWER`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipelines.config import load_config
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.loop import train_worker
from pipelines.train.optimizer_config import OptimizerConfig
from pipelines.train.run import worker_settings
from ray_jobs.session import quiet_environment

POWER = 0.95
ONLINE: dict[str, Any] = {"alpha": 1e-6}
# Name -> first guess of the rate over AdamW's, and the optimizer's fields.
SETTINGS: dict[str, tuple[float, dict[str, Any]]] = {
    "OnTIES, p = 0.5": (1.1, ONLINE | {"name": "onties", "density": 0.5}),
    "OnTIES, p = 0.1": (2.0, ONLINE | {"name": "onties", "density": 0.1}),
    "OnDARE, p = 0.5": (2.0, ONLINE | {"name": "ondare", "density": 0.5}),
    "OnDARE, p = 0.1": (7.0, ONLINE | {"name": "ondare", "density": 0.1}),
    "OnDARE, p = 0.5, rescaled": (
        1.0,
        ONLINE | {"name": "ondare", "density": 0.5, "rescale": True},
    ),
    "ChildTuning-F, p = 0.5": (1.35, {"gradient_density": 0.5}),
    "ChildTuning-F, p = 0.1": (2.7, {"gradient_density": 0.1}),
    "average exported, c = 0.01": (2.0, {"ema": {"coefficient": 0.01, "mode": "export"}}),
    "average pulls, c = 0.01": (1.2, {"ema": {"coefficient": 0.01, "mode": "pull"}}),
}


def delta_norm(config: AlignConfig, folder: Path) -> float:
    """The norm of what a run's export differs by from its start."""
    settings = worker_settings(config, plan_alignment(config, folder / "cache"), folder, folder)
    run = Path(tempfile.mkdtemp(dir=folder))
    train_worker({"runs": [settings | {"folder": str(run)}]})
    return json.loads((run / "exported").read_text())["delta"]["delta_norm"]


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    arguments = parser.parse_args()
    path = arguments.run / "configs" / "align" / "dpo-mixture.yaml"
    if not path.is_file():
        print(f"{arguments.run}: no finished demo; make demo", file=sys.stderr)
        return
    quiet_environment()
    config = load_config(path, AlignConfig)
    config = config.model_copy(update={"strategy": "single", "num_workers": 1})
    rate = config.optimizer.learning_rate
    tau = {"base": arguments.run / "models" / "base", "tuned": config.model}
    with tempfile.TemporaryDirectory() as folder:

        def norm_of(factor: float, **fields: Any) -> float:
            fields |= {"tau": tau} if "name" in fields else {}
            optimizer = OptimizerConfig(learning_rate=factor * rate, **fields)
            return delta_norm(config.model_copy(update={"optimizer": optimizer}), Path(folder))

        target = norm_of(1.0)
        print(f"AdamW at {rate:g}: a delta's norm of {target:.4f}\n", flush=True)
        print("| optimizer | rate / AdamW's | norm / AdamW's |\n|---|---|---|", flush=True)
        for name, (guess, fields) in SETTINGS.items():
            if name in arguments.only:
                factor = guess * (target / norm_of(guess, **fields)) ** (1 / POWER)
                ratio = norm_of(factor, **fields) / target
                print(f"| {name} | {factor:.3f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
