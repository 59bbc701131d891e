"""The training loop of one worker under Ray Train."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from operators.losses import PAIR_OBJECTIVES, PairLogProbabilities
from pipelines.train.checkpoints import is_first, load_checkpoint, save_checkpoint, saved_steps
from pipelines.train.config import AlignConfig
from pipelines.train.data import Batch, Pair, collate, global_batch, num_steps_of, prepare_pairs
from pipelines.train.optimizer import build_optimizer, build_schedule
from pipelines.train.policy import (
    distribute,
    export_model,
    load_model,
    reduce_gradients,
    response_log_probabilities,
)
from pipelines.train.reference import reference_log_probabilities

METRICS_FILE = "metrics.jsonl"
MODEL_FOLDER = "model"


def train_worker(settings: dict[str, Any]) -> None:
    """Train, from the newest checkpoint if there is one, and export the model.

    Args:
        settings: `config` (an AlignConfig as JSON) and `folder`, which all workers can reach.
    """
    config = AlignConfig.model_validate_json(settings["config"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run = _Run(config, Path(settings["folder"]), device)
    run.train()
    if hasattr(run.optimizer, "merge_pending"):
        run.optimizer.merge_pending()
    export_model(run.model, config.model, run.folder / MODEL_FOLDER)


@dataclass(slots=True)
class _Totals:
    """What a step adds up over micro-batches and workers; each a sum over pairs."""

    values: Tensor  # (5,): loss, correct, margin, chosen and rejected log-probabilities

    def per_pair(self, num_pairs: int) -> dict[str, float]:
        """Means over the global batch, named as in metrics.jsonl."""
        names = ("loss", "accuracy", "margin", "chosen_log_probability", "rejected_log_probability")
        return dict(zip(names, (self.values / num_pairs).tolist(), strict=True))


class _Run:
    """One worker's model, data and optimizer, and the steps on them."""

    def __init__(self, config: AlignConfig, folder: Path, device: torch.device) -> None:
        self.config, self.folder = config, folder
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.objective = PAIR_OBJECTIVES[config.objective.name]
        self.pairs, pad = prepare_pairs(config)
        self.collate: Callable[[list[Pair]], Batch] = partial(collate, pad=pad, device=device)
        self.share = config.global_batch_size // self.world
        self.micro_batch = config.micro_batch_size or self.share
        self.num_steps = config.num_steps or num_steps_of(
            config.num_epochs, len(self.pairs), config.global_batch_size
        )
        self.model: nn.Module = distribute(load_model(config.model), config.strategy, device)
        # Before any forward pass: after one, the root of fsdp2 holds whole parameters.
        self.optimizer: Optimizer = build_optimizer(config.optimizer, self.model, config.seed)
        self.schedule = build_schedule(config, self.optimizer, self.num_steps)
        self.reference = reference_log_probabilities(
            self.model,
            self.pairs,
            self.collate,
            folder,
            batch_size=2 * self.micro_batch,
            mean_over_tokens=self.objective.mean_over_tokens,
        ).to(device)
        self.first_step = self._resume()

    def _resume(self) -> int:
        """Go back to the newest checkpoint; returns how many steps it has."""
        done = max(saved_steps(self.folder), default=0)
        if done:
            load_checkpoint(self.folder, done, self.model, self.optimizer)
            self.schedule.last_epoch = done - 1  # the schedule is a function of the step alone
            self.schedule.step()
        if is_first():
            _keep_metrics(self.folder / METRICS_FILE, done)
        return done

    def train(self) -> None:
        """All steps that are left; step n sees global batch n - 1, whatever came before."""
        self.model.train()
        for step in range(self.first_step + 1, self.num_steps + 1):
            totals, norm = self._step(step - 1)
            if is_first():
                record = {"step": step, **totals.per_pair(self.config.global_batch_size)}
                record |= {"gradient_norm": norm, "learning_rate": self._learning_rate}
                with (self.folder / METRICS_FILE).open("a") as file:
                    file.write(json.dumps(record) + "\n")
            self.schedule.step()
            if step % self.config.checkpoint_every == 0 or step == self.num_steps:
                save_checkpoint(self.folder, step, self.model, self.optimizer)

    @property
    def _learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _step(self, number: int) -> tuple[_Totals, float]:
        """One optimizer step on global batch `number`."""
        rows = global_batch(
            len(self.pairs), self.config.global_batch_size, number, self.config.seed
        )
        mine = rows[self.rank * self.share : (self.rank + 1) * self.share]
        totals = torch.zeros(5, device=self.reference.device)
        self.optimizer.zero_grad()
        for first in range(0, self.share, self.micro_batch):
            last = first + self.micro_batch >= self.share
            with reduce_gradients(self.model, now=last):
                totals += self._micro_batch(mine[first : first + self.micro_batch])
        norm = self._clip()
        self.optimizer.step()
        if self.world > 1:
            dist.all_reduce(totals)
        if not torch.isfinite(totals).all():
            raise RuntimeError(
                f"step {number + 1}: the loss is not finite; try a lower optimizer.learning_rate "
                "or a smaller max_gradient_norm"
            )
        return _Totals(totals), norm

    def _micro_batch(self, rows: list[int]) -> Tensor:
        """Add the gradients of some pairs; returns their sums for the metrics."""
        batch = self.collate([self.pairs[row] for row in rows])
        chosen, rejected = response_log_probabilities(
            self.model, batch, mean_over_tokens=self.objective.mean_over_tokens
        )
        pairs = PairLogProbabilities(chosen, rejected, *self.reference[rows].unbind(1))
        objective = self.config.objective
        losses = self.objective.loss(pairs, objective.beta, objective.label_smoothing)
        # Workers' gradients are averaged, so each one's sum is multiplied by their number: the
        # result is the mean over the global batch, however it is cut up.
        (losses.sum() * (self.world / self.config.global_batch_size)).backward()
        margin = objective.beta * pairs.margin.detach()
        columns = (losses, (margin > 0).float(), margin, chosen, rejected)
        return torch.stack([column.detach().sum() for column in columns])

    def _clip(self) -> float:
        """Clip the gradients' global norm, where the config wants it; returns the norm before."""
        limit = self.config.max_gradient_norm
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, torch.inf if limit is None else limit, foreach=True
        )
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _keep_metrics(path: Path, steps: int) -> None:
    """Drop the lines of steps that will be made again."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps]
        path.write_text("".join(kept))
