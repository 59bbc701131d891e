"""The training loop of one worker under Ray Train."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from operators.optim import OnlineMergingAdamW
from pipelines.checkpoints.hub import bring
from pipelines.commit import lock, write_atomically
from pipelines.errors import InputError
from pipelines.train.causality import check_reads_back
from pipelines.train.checkpoints import CheckpointWriter, saved_steps, step_folder
from pipelines.train.config import AlignConfig
from pipelines.train.data import (
    PAD,
    TokenTable,
    collate_mismatched,
    deal,
    global_batch,
    rows_seen,
)
from pipelines.train.errors import DivergenceError, comes_again, has_failed, record_failure
from pipelines.train.evaluation import Evaluations, held_out_batches, measure
from pipelines.train.export import export_result
from pipelines.train.files import EXPORTED_FILE, MODEL_FOLDER, REFERENCE_FILE, REMARK_FILE
from pipelines.train.metrics import (
    Clock,
    MetricsWriter,
    UpdateLength,
    Watch,
    add_up,
    delta_metrics,
    merge_metrics,
)
from pipelines.train.micro_losses import MicroLosses, Whole
from pipelines.train.models import model_paths
from pipelines.train.objectives import (
    Shares,
    mismatched_point,
    shares_of,
    weights_of,
)
from pipelines.train.optimizer import learning_rate, set_learning_rate
from pipelines.train.packing import check_rows_apart
from pipelines.train.reference import AskedRows, Rows, with_references
from pipelines.train.reference_store import largest_batch
from pipelines.train.reward_start import pad_token
from pipelines.train.router import real_tokens, router_loss
from pipelines.train.scoring import Scorer
from pipelines.train.strategies import build_strategy, first_rank


def train_worker(settings: dict[str, Any]) -> None:
    """Train each of `settings["runs"]`, from its newest checkpoint if there is one, and export its
    model.

    A permanent failure is recorded for the driver; workers that start after it do nothing.

    Args:
        settings: `runs`, each with `config` (an AlignConfig as JSON), `folder` of the run, `cache`,
            the `tokens` below it and their fingerprint `data_key`, `held_out`
            rows (`tokens` and `key`) or None, `bounds` that a study asks of it or None, the
            reference model's
            fingerprint `reference_key`, `num_steps`, `num_threads` of each worker on a CPU, or
            None, and `offline`: whether the hub may not be asked. All workers must be able to
            reach the folders, but for the hub's models, which a node fetches that lacks them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for run in settings["runs"]:
        if device.type == "cpu":
            torch.set_num_threads(run["num_threads"] or share_of_cores())
        if not _train_run(run, device):
            return


def share_of_cores() -> int:
    """The cores per worker: this machine's cores (or the number that Ray has) / its workers."""
    import ray

    cores = len(os.sched_getaffinity(0))
    if ray.is_initialized():
        here = ray.get_runtime_context().get_node_id()
        (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
        cores = min(cores, int(node["Resources"].get("CPU", cores)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _train_run(settings: dict[str, Any], device: torch.device) -> bool:
    """Train and export one run unless it is done; returns whether the next run may follow."""
    folder = Path(settings["folder"])
    if not folder.is_dir() or (folder / EXPORTED_FILE).is_file():
        return True  # earlier workers finished it and were lost
    if has_failed(folder):
        return False
    config = AlignConfig.model_validate_json(settings["config"])
    try:
        with alone(folder):
            bring(model_paths(config).values(), offline=settings["offline"])
            run = Run(config, settings, device)
            run.train()
            run.strategy.finish()
            delta = delta_metrics(run.strategy, config)
            saved = export_result(run.strategy, config, folder / MODEL_FOLDER)
            told = run.evaluations and run.evaluations.told(run.num_steps)
    except DivergenceError as error:  # all workers see it at once, so none waits for another
        record_failure(folder, error)
        return False
    except Exception as error:
        if comes_again(error):
            record_failure(folder, error)
        raise
    if saved is not None:  # this is the first rank
        optimizer = run.strategy.optimizer
        path = optimizer.path if isinstance(optimizer, OnlineMergingAdamW) else None
        found = {"optimizer_path": path, "rounding": saved.rounding, "delta": delta}
        exported = {**found, **asdict(saved.digest)}
        exported |= {} if told is None else {"evaluation": told}
        write_atomically(folder / EXPORTED_FILE, json.dumps(exported))
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until the first worker of a killed attempt is gone, and block later ones."""
    if not first_rank():
        yield
        return
    with lock(folder / "worker.lock", wait=True):
        yield


class Run:
    """One worker's model, data and optimizer, and the steps on them."""

    def __init__(self, config: AlignConfig, settings: dict[str, Any], device: torch.device) -> None:
        self.config, self.device = config, device
        self.folder = Path(settings["folder"])
        self.num_steps: int = settings["num_steps"]
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.objective = config.objective.definition
        self.kind = config.objective.row_kind
        self.table = TokenTable(settings["tokens"], self.kind.sequences_per_row)
        self.micro_batch = config.micro_batch_size or config.global_batch_size // self.world
        self.strategy = build_strategy(config, device)
        self.model = self.strategy.model
        with self.strategy.evaluating():
            self.router = router_loss(config, self.strategy, device)
            self.scorer = self._scorer(settings)
        pad = pad_token(self.strategy.weights.source.config) or PAD
        self.losses = MicroLosses(config, self.scorer, self.router, pad, device)
        if config.head is None:
            with self.strategy.evaluating(), self.strategy.forward_context():
                check_reads_back(self.model, self.table, config.precision, device)
        self.rows, self.held_out = self._rows(settings)
        self._report_misfit()
        if config.packing:
            with self.strategy.evaluating(), self.strategy.forward_context():
                check_rows_apart(self.model, self.table.largest_id() + 1, config.precision, device)
        self.first_step = self.last_step = self._resume()
        self.evaluations: Evaluations | None = None
        if config.evaluation is not None:
            self.evaluations = Evaluations(
                config.evaluation, self.folder, self.first_step, settings.get("bounds")
            )
        self.model.train()

    def _scorer(self, settings: dict[str, Any]) -> Scorer:
        """The policy's scorer, for the largest batch that there may be."""
        rows = self.micro_batch * self.table.sequences_per_row
        largest = rows * int(self.table.lengths.max())
        if (held_out := settings.get("held_out")) is not None:
            table = TokenTable(held_out["tokens"], self.kind.sequences_per_row)
            largest = max(largest, largest_batch(table, held_out_batches(table, self.device)))
        if self.config.head is not None:
            largest = 0  # it has no logits of tokens
        chunk, routers = self.config.logits_chunk, self.router is not None
        return Scorer(self.strategy, chunk, largest, self.device, routers=routers)

    def _report_misfit(self) -> None:
        """Tell the driver if logits cannot be had by chunks.

        Raises:
            InputError: the config asks for chunks.
        """
        if not self.scorer.misfit:
            return
        line = f"{self.config.model}: logits of whole micro-batches, because {self.scorer.misfit}"
        if self.config.logits_chunk is not None:
            raise InputError(f"logits_chunk: has no effect on {line}")
        if first_rank():
            write_atomically(self.folder / REMARK_FILE, line)

    def _rows(self, settings: dict[str, Any]) -> tuple[Rows, Rows | None]:
        """The rows of training and those held out, if there are any, with their references."""
        size, seed = self.config.global_batch_size, self.config.seed
        seen = rows_seen(self.table.num_rows, size, self.num_steps, seed)
        asked = [AskedRows(self.table, settings["data_key"], seen)]
        if (held_out := settings.get("held_out")) is not None:
            table = TokenTable(held_out["tokens"], self.kind.sequences_per_row)
            asked.append(AskedRows(table, held_out["key"], np.arange(table.num_rows)))
        found = with_references(
            asked,
            self.config,
            self.scorer,
            self.device,
            cache=Path(settings["cache"]),
            model_key=settings["reference_key"],
            report=self._report_reference,
        )
        return found[0], found[1] if len(found) > 1 else None

    def _report_reference(self, done: int, total: int) -> None:
        """Tell the driver how many rows have reference log-probabilities."""
        if first_rank():
            record = {"done": done, "total": total}
            write_atomically(self.folder / REFERENCE_FILE, json.dumps(record))

    def _resume(self) -> int:
        """Load the newest checkpoint; returns its step, 0 if there is none."""
        done = max(saved_steps(self.folder), default=0)
        if done:
            self.strategy.load(step_folder(self.folder, done))
        return done

    def train(self) -> None:
        """Run the remaining steps; step n always uses global batch n - 1."""
        config, clock = self.config, Clock()
        watch = Watch(config, self.folder, self.first_step)
        with (
            MetricsWriter(self.folder, self.first_step, config) as out,
            CheckpointWriter(self.folder, config) as checkpoints,
        ):
            if self.first_step == 0 and config.evaluation and config.evaluation.on_start:
                with clock.stopped():
                    out.write({"step": 0, **self._measure()})
            for step in range(self.first_step + 1, self.num_steps + 1):
                if self._is_last(step - 1):
                    break
                rows = global_batch(
                    self.table.num_rows, config.global_batch_size, step - 1, config.seed
                )
                set_learning_rate(
                    self.strategy.optimizer, learning_rate(config, step, self.num_steps)
                )
                norms_every = config.norms_every or config.checkpoint_every
                measured = step == self.num_steps or step % norms_every == 0
                record = self._gradients(rows)
                length = UpdateLength(self.strategy) if measured else None
                record["gradient_norm"] = self.strategy.update(partial(watch.check, step, record))
                record["learning_rate"] = learning_rate(config, step, self.num_steps)
                if length is not None:
                    record["update_norm"] = length.measure()
                    record |= delta_metrics(self.strategy, config)
                with clock.stopped():
                    record |= self._evaluate(step)
                due = step % config.checkpoint_every == 0 or self._is_last(step)
                due |= self._kept_step == step
                if due:
                    record |= merge_metrics(self.strategy)
                record |= self.table.rows_by_set(rows)
                record |= clock.measure(int(self.table.lengths[rows].sum()))
                out.write({"step": step, **record})
                checkpoints.check()
                if due:
                    checkpoints.save(step, self.strategy, best=self._kept_step)
                self.last_step = step
        if self._kept_step not in (None, self.last_step):
            self.strategy.load(step_folder(self.folder, self._kept_step))

    def _is_last(self, step: int) -> bool:
        """Whether the run ends after this step."""
        is_over = self.evaluations is not None and self.evaluations.is_over
        return step == self.num_steps or is_over

    @property
    def _kept_step(self) -> int | None:
        """The step of the best evaluation so far, if its model is to be written."""
        return None if self.evaluations is None else self.evaluations.kept_step

    def _evaluate(self, step: int) -> dict[str, float]:
        """Numbers of the held-out rows, at steps that have an evaluation."""
        evaluation = self.config.evaluation
        if evaluation is None or (step % evaluation.every and step < self.num_steps):
            return {}
        assert self.evaluations is not None
        numbers = self._measure()
        self.evaluations.add(step, numbers)
        return numbers

    def _measure(self) -> dict[str, float]:
        """Numbers of the held-out rows."""
        assert self.held_out is not None
        return measure(self.losses, self.held_out, self.device)

    def _gradients(self, rows: list[int]) -> dict[str, float]:
        """Gradients of a global batch's loss; returns its metrics."""
        mine = deal(rows, self.table.lengths, self.rank, self.world)
        shares = shares_of(self.table, rows)
        micro = [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]
        metrics: dict[str, Tensor] = {}
        point = self._reference_point(micro, shares) if self.kind.has_point else None
        # One micro-batch counts in its own pass.
        counts = self._expert_counts(micro) if self.router and len(micro) > 1 else None
        whole = Whole(shares, point, counts)
        for number, part in enumerate(micro):
            with self.strategy.accumulating(last=number == len(micro) - 1):
                (result,) = self.losses.of(self.rows, part, whole)
                # Gradients are averaged over workers, so each loss is multiplied by their number.
                # The result is the mean over the global batch, for any split of it.
                self.strategy.backward(result.loss * self.world)
            for name, value in {"loss": result.loss.detach(), **result.metrics}.items():
                metrics[name] = metrics.get(name, 0) + value
        sums = add_up(torch.stack(list(metrics.values())))
        record = dict(zip(metrics, sums.tolist(), strict=True))
        return record if point is None else record | {"kl": float(point)}

    def _expert_counts(self, micro: list[list[int]]) -> Tensor:
        """How many tokens of the global batch go to each expert, before any of its gradients."""
        assert self.router is not None
        parts = []
        for rows in micro:
            batch = self.losses.batch(self.rows, rows)
            tokens = real_tokens(self.table, rows, batch)
            parts.append(self.router.counts(self.scorer.routing(batch), tokens))
        return add_up(torch.stack(parts).sum(0))

    @torch.no_grad()
    def _reference_point(self, micro: list[list[int]], shares: Shares) -> Tensor:
        """KTO's z0 of the global batch, before any of its gradients."""
        batches = [(r, collate_mismatched(self.table, r, PAD, self.device)) for r in micro]
        before = self.rows.reference
        assert before is not None  # KTO has a reference
        reference = torch.cat([before.mismatched(*batch) for batch in batches])

        def policy() -> Tensor:
            found = [self.scorer.score(batch).responses for _, batch in batches]
            return torch.cat([each.log_probability for each in found])

        weights = weights_of(self.table, [row for rows in micro for row in rows], self.device)
        return mismatched_point(policy, reference, add_up, shares.rows, weights)
