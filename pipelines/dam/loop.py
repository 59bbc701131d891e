"""The training of DAM's coefficients in one process, which Ray Train starts."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from operators.dam_losses import coefficient_penalty, mean_over_tokens
from pipelines.checkpoints.hub import bring
from pipelines.commit import write_atomically
from pipelines.dam.config import DamConfig
from pipelines.dam.model import ExpertsModel, build
from pipelines.merge.coefficients import FILE, Coefficients
from pipelines.train.checkpoints import CheckpointWriter, saved_steps, step_folder
from pipelines.train.data import PAD, TokenTable, collate, global_batch
from pipelines.train.errors import DivergenceError, comes_again, has_failed, record_failure
from pipelines.train.evaluation import Evaluations
from pipelines.train.evaluation_config import PREFIX
from pipelines.train.files import EXPORTED_FILE
from pipelines.train.loop import alone, share_of_cores
from pipelines.train.metrics import Clock, MetricsWriter
from pipelines.train.reference_store import small_batches

STATE_FILE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of torch's AdamW


def dam_worker(settings: dict[str, Any]) -> None:
    """Train each of `settings["runs"]`, from its newest checkpoint if there is one, and write its
    coefficients.

    A permanent failure is recorded for the driver.

    Args:
        settings: `runs`, each with `config` (a DamConfig as JSON), `folder` of the run, `tables`
            and `held_out`: by the position of an expert, the folder of its rows' tokens;
            `num_steps`, `num_threads` on a CPU, or None, and `offline`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for run in settings["runs"]:
        if device.type == "cpu":
            torch.set_num_threads(run["num_threads"] or share_of_cores())
        train_run(run, device)


def train_run(settings: dict[str, Any], device: torch.device) -> None:
    """Train one run, and write `dam.safetensors` and then the file that says so into its folder."""
    folder = Path(settings["folder"])
    if not folder.is_dir() or (folder / EXPORTED_FILE).is_file() or has_failed(folder):
        return
    config = DamConfig.model_validate_json(settings["config"])
    try:
        with alone(folder):
            paths = [config.base_model, *(each.model for each in config.models)]
            bring(paths, offline=settings["offline"])
            run = Run(config, settings, device)
            run.train()
            told = run.evaluations and run.evaluations.told(run.num_steps)
            run.coefficients().write(folder / FILE)
            write_atomically(folder / EXPORTED_FILE, json.dumps({"evaluation": told}))
    except DivergenceError as error:
        record_failure(folder, error)
    except Exception as error:
        if comes_again(error):
            record_failure(folder, error)
        raise


@dataclass(slots=True)
class State:
    """What a run must keep to go on with the same bytes: coefficients and Adam's moments."""

    experts: ExpertsModel
    optimizer: torch.optim.AdamW

    def save(self, folder: Path) -> None:
        """Write the state."""
        tensors = {}
        for name, parameter in self.experts.coefficients.items():
            tensors[name] = parameter.detach()
            for moment in MOMENTS:
                tensors[f"{name}:{moment}"] = self.optimizer.state[parameter][moment]
        on_cpu = {name: each.cpu().contiguous() for name, each in tensors.items()}
        write_atomically(folder / STATE_FILE, save(on_cpu))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        tensors = load_file(folder / STATE_FILE)
        for name, parameter in self.experts.coefficients.items():
            parameter.copy_(tensors[name])
            kept = {moment: tensors[f"{name}:{moment}"] for moment in MOMENTS}
            for moment in MOMENTS[:2]:
                kept[moment] = kept[moment].to(parameter.device)
            self.optimizer.state[parameter] = kept


class Run:
    """The experts, their rows, the optimizer, and the steps."""

    def __init__(self, config: DamConfig, settings: dict[str, Any], device: torch.device) -> None:
        self.config, self.device, self.folder = config, device, Path(settings["folder"])
        self.num_steps: int = settings["num_steps"]
        self.tables = _opened(settings["tables"])
        self.held_out = _opened(settings["held_out"])
        self.experts = build(config, device)
        self.optimizer = torch.optim.AdamW(
            self.experts.coefficients.values(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=0.0,
            foreach=False,
        )
        self.state = State(self.experts, self.optimizer)
        self.first_step = max(saved_steps(self.folder), default=0)
        if self.first_step:
            self.state.load(step_folder(self.folder, self.first_step))
        self.evaluations: Evaluations | None = None
        if config.evaluation is not None:
            self.evaluations = Evaluations(config.evaluation, self.folder, self.first_step)

    def coefficients(self) -> Coefficients:
        """The coefficients as they are now."""
        found = {name: each.detach().cpu() for name, each in self.experts.coefficients.items()}
        return Coefficients(FILE, self.experts.settings, found)

    def train(self) -> None:
        """Run the remaining steps; step n always uses the batches n - 1 of the sets."""
        clock, last = Clock(), self.first_step
        with (
            MetricsWriter(self.folder, self.first_step, self.config) as out,
            CheckpointWriter(self.folder, self.config) as checkpoints,
        ):
            for step in range(self.first_step + 1, self.num_steps + 1):
                if self._is_last(step - 1):
                    break
                rows = self._rows(step - 1)
                record = self._gradients(rows)
                record["gradient_norm"] = self._update(step, record["loss"])
                record["learning_rate"] = self.config.learning_rate
                with clock.stopped():
                    record |= self._evaluate(step)
                counts = [self.tables[place].lengths[each].sum() for place, each in rows.items()]
                out.write({"step": step, **record, **clock.measure(int(sum(counts)))})
                if self._is_due(step):
                    checkpoints.save(step, self.state, best=self._kept_step)
                last = step
        if self._kept_step not in (None, last):
            self.state.load(step_folder(self.folder, self._kept_step))

    def _rows(self, number: int) -> dict[int, list[int]]:
        """The rows of a step, by expert."""
        size, seed = self.config.rows_per_set, self.config.seed
        return {
            place: global_batch(table.num_rows, size, number, seed)
            for place, table in self.tables.items()
        }

    def _gradients(self, rows: dict[int, list[int]]) -> dict[str, float]:
        """Gradients of a step's loss; returns its numbers."""
        record, total = {}, 0.0
        for place, chosen in rows.items():
            values, counts = self._per_token(self.tables[place], chosen, place)
            mean = mean_over_tokens(values, counts)
            part = self._weight * mean
            part.backward()
            record[f"loss_{self._title(place)}"] = mean.item()
            total += part.item()
        config = self.config
        penalty = coefficient_penalty(
            self._columns(), cosine=config.cosine_weight, l1=config.l1, l2=config.l2
        )
        if penalty.requires_grad:
            penalty.backward()
        return {"loss": total + penalty.item(), **record, "penalty": penalty.item()}

    def _per_token(self, table: TokenTable, rows: list[int], place: int) -> tuple[Tensor, Tensor]:
        """The loss of each token of some rows of an expert, and which tokens count: (rows, length)
        each.
        """
        loss, batch = self.config.definition, collate(table, rows, PAD, self.device)
        expert = []
        if loss.needs_experts:  # before the merged pass, whose activations are kept
            with self.experts.acting_as(place):
                expert = [self.experts.logits(batch.ids)]
        merged = self.experts.logits(batch.ids)
        values = loss.per_token(merged, *expert, **self.config.loss_parameters)
        if self.config.tokens == "response":  # the positions that predict one
            counts = torch.zeros_like(batch.response, dtype=torch.bool)
            counts[:, :-1] = batch.response[:, 1:].bool()
            return values, counts
        lengths = torch.as_tensor(table.lengths[rows][:, :1], device=self.device)
        return values, torch.arange(batch.ids.shape[1], device=self.device) < lengths

    def _columns(self) -> Iterator[Tensor]:
        """The coefficients of columns: not those of biases, which are one number each."""
        yield from (each for each in self.experts.coefficients.values() if each.dim() > 1)

    @property
    def _weight(self) -> float:
        """Of a set's mean in the loss."""
        return self.config.definition.weight_of_set(len(self.tables))

    def _title(self, place: int) -> str:
        return self.config.sets[place].title

    def _update(self, step: int, loss: float) -> float:
        """Clip the gradients and step; returns their norm before.

        Raises:
            DivergenceError: loss or gradients are not finite.
        """
        most = self.config.max_gradient_norm
        parameters = list(self.experts.coefficients.values())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if most is None else most))
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise DivergenceError(
                    f"step {step}: the {name} is {value}; try a lower learning_rate"
                )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def _evaluate(self, step: int) -> dict[str, float]:
        """The loss on held-out rows without penalties, at steps that have an evaluation."""
        evaluation = self.config.evaluation
        if evaluation is None or (step % evaluation.every and step < self.num_steps):
            return {}
        assert self.evaluations is not None
        numbers = {PREFIX + "loss": 0.0}
        for place, table in self.held_out.items():
            total, count = 0.0, 0
            for rows in small_batches(table, self.device):
                values, counts = self._per_token(table, rows, place)
                total += float(torch.where(counts, values, 0).double().sum())
                count += int(counts.sum())
            numbers[f"{PREFIX}loss_{self._title(place)}"] = total / count
            numbers[PREFIX + "loss"] += self._weight * total / count
        self.evaluations.add(step, numbers)
        return numbers

    def _is_due(self, step: int) -> bool:
        """Whether the state after a step is written."""
        return (
            step % self.config.checkpoint_every == 0
            or self._is_last(step)
            or (self._kept_step == step)
        )

    def _is_last(self, step: int) -> bool:
        """Whether the run ends after this step."""
        is_over = self.evaluations is not None and self.evaluations.is_over
        return step == self.num_steps or is_over

    @property
    def _kept_step(self) -> int | None:
        """The step of the best evaluation so far, if its coefficients are to be written."""
        return None if self.evaluations is None else self.evaluations.kept_step


def _opened(folders: dict[str, str]) -> dict[int, TokenTable]:
    """Tables of rows, by expert."""
    return {int(place): TokenTable(folder, 1) for place, folder in folders.items()}
