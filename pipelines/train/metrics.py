"""A run's metrics (a JSON line per step, TensorBoard, trackers), and the stop if it diverges."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from operators.metrics import delta_sums, norm_and_cosine, product_change_norm
from operators.optim import OnlineMergingAdamW, Tau
from pipelines.train.config import AlignConfig
from pipelines.train.errors import DivergenceError
from pipelines.train.files import METRICS_FILE, TENSORBOARD_FOLDER
from pipelines.train.interfaces import Tracked
from pipelines.train.optimizer import delta_of
from pipelines.train.strategies import Strategy, first_rank
from pipelines.train.trackers import Tracker, open_trackers

WINDOW = 10  # steps over which a collapse is judged
MEASURED = ("tokens_per_s", "seconds", "memory_bytes")  # not determined by the seed


class MetricsWriter:
    """Writes the lines of metrics.jsonl, on the first rank only; a context manager."""

    def __init__(self, folder: Path, steps_done: int, config: Tracked) -> None:
        self._path = folder / METRICS_FILE
        self._board = None
        self._trackers: list[Tracker] = []
        if not first_rank():
            return
        _keep(self._path, steps_done)
        self._trackers = open_trackers(config, folder)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            place = folder / TENSORBOARD_FOLDER
            self._board = SummaryWriter(str(place), purge_step=steps_done + 1)

    def __enter__(self) -> Self:
        return self

    def write(self, record: dict[str, Any]) -> None:
        """Add a step's numbers; `step` is one of them."""
        if not first_rank():
            return
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        step, values = record["step"], {k: v for k, v in record.items() if k != "step"}
        for tracker in self._trackers:
            tracker.write(step, values)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for tracker in self._trackers:
            tracker.close(failed=error is not None)
        if self._board is not None:
            self._board.close()


def _keep(path: Path, steps: int) -> None:
    """Drop the lines of steps that will be repeated; all of them if the run begins again."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True) if steps else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps]
        path.write_text("".join(kept))


def _levels(path: Path, steps: int) -> list[float]:
    """`chosen_level` of the earlier steps, on all ranks; the first rank reads it from its lines."""
    found = torch.zeros(steps + 1, dtype=torch.float64)  # the last entry is their number
    if first_rank() and path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        levels = [chosen_level(record) for record in records if 0 < record["step"] <= steps]
        found[: len(levels)] = torch.tensor(levels, dtype=torch.float64)
        found[-1] = len(levels)
    on_all_ranks = add_up(found).tolist()
    return on_all_ranks[: int(on_all_ranks[-1])]


def earlier_records(path: Path, steps: int) -> list[dict[str, float]]:
    """The complete lines of the first `steps` steps, on all ranks; the first rank reads them."""
    found: list[Any] = [[]]
    if first_rank() and path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        found = [[record for record in records if record["step"] <= steps]]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def chosen_level(record: dict[str, float]) -> float:
    """The log-probability of the chosen responses in nats per token: relative to the reference, or
    absolute if the objective has none.
    """
    if "chosen_log_ratio_per_token" in record:
        return record["chosen_log_ratio_per_token"]
    return record.get("chosen_log_probability", -record["loss"])


class Watch:
    """Stops a run that diverges, with advice.

    Args:
        folder: of the run; its lines up to `first_step` are read, so that a resumed run stops at
            the same step as an undisturbed one. All ranks call together.
    """

    def __init__(self, config: AlignConfig, folder: Path, first_step: int) -> None:
        self._limit = config.min_chosen_log_ratio
        self._objective = config.objective
        self._levels: list[float] = []
        if self._limit is not None:
            self._levels = _levels(folder / METRICS_FILE, first_step)

    def check(self, step: int, record: dict[str, float], gradient_norm: float) -> None:
        """Check a step's numbers.

        Raises:
            DivergenceError: loss or gradients are not finite, or the policy has forgotten the
                chosen responses.
        """
        for name, value in (("loss", record["loss"]), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                raise DivergenceError(
                    f"step {step}: the {name} is {value}; try a lower optimizer.learning_rate, "
                    "a longer warmup_share or a smaller max_gradient_norm"
                )
        if self._limit is None or self._objective.definition.on_rewards:
            return
        self._levels.append(chosen_level(record))
        if len(self._levels) < WINDOW:
            return
        uses_reference = self._objective.definition.uses_reference
        start = 0.0 if uses_reference else fmean(self._levels[:WINDOW])
        change = fmean(self._levels[-WINDOW:]) - start
        if change < self._limit:
            than = "the reference" if uses_reference else f"the first {WINDOW} steps"
            more = {"dpo": ", a larger objective.beta or objective.rpo_alpha"}
            usual = " or a larger objective.beta" if uses_reference else " or a longer warmup_share"
            raise DivergenceError(
                f"step {step}: the chosen responses have lost {-change:.2f} nats a token against "
                f"{than} (min_chosen_log_ratio {self._limit}); try a lower "
                f"optimizer.learning_rate{more.get(self._objective.label, usual)}"
            )


class Clock:
    """Tokens per second since the last call, and the peak memory of this process."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """In the block, time does not count."""
        begin = time.monotonic()
        yield
        self._last += time.monotonic() - begin

    def measure(self, num_tokens: int) -> dict[str, float]:
        """The measured part of a step's line."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return {
            "tokens_per_s": num_tokens / seconds,
            "seconds": seconds,
            "memory_bytes": peak_memory(),
        }


def peak_memory() -> int:
    """The peak memory so far in bytes: on the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # ru_maxrss would also include the parent's memory at the fork.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@torch.no_grad()
def delta_metrics(strategy: Strategy, config: AlignConfig) -> dict[str, float]:
    """Norm of the change that training has made so far; if there is a tau, its cosine with tau and
    its length as a multiple of tau's.

    The initial weights are read again from their files, range by range; every rank must call.
    """
    source = None
    if config.optimizer.tau is not None:
        source = Tau(delta_of(config), config.optimizer.missing_delta)
    sums = torch.zeros(3, dtype=torch.float64)
    for part, values in strategy.owned():
        where = (part.name, part.start, part.start + part.count)
        tau = None
        if source is not None:  # 0 where tau has nothing, as in the merge
            covered = source.covers(part)
            tau = source.read(part, part.start, part.count) if covered else torch.zeros(part.count)
        sums += delta_sums(values.detach().cpu(), strategy.weights.read(*where).float(), tau)
    sums = add_up(sums)
    norm, cosine = norm_and_cosine(sums)
    if source is None:
        return {"delta_norm": norm}
    tau_norm = math.sqrt(float(sums[2]))
    return {
        "delta_norm": norm,
        "tau_cosine": cosine,
        "delta_to_tau": norm / tau_norm if tau_norm else 0.0,
    }


class UpdateLength:
    """Measures the length of one update from a copy of the weights before it, in CPU memory."""

    @torch.no_grad()
    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._before = _copies(strategy)

    @torch.no_grad()
    def measure(self) -> float:
        """Norm of what the weights have moved since. Every rank must call."""
        lora = self._strategy.config.lora
        if lora is not None:
            pairs = zip(_pairs(self._before), _pairs(_copies(self._strategy)), strict=True)
            scale = lora.alpha / lora.rank
            return math.hypot(*(product_change_norm(old, new, scale) for old, new in pairs))
        sums = torch.zeros(3, dtype=torch.float64)
        for (_, values), before in zip(self._strategy.owned(), self._before, strict=True):
            sums += delta_sums(values.detach().cpu(), before)
        return math.sqrt(float(add_up(sums)[0]))


def _copies(strategy: Strategy) -> list[Tensor]:
    """Copies of the weights that this rank owns; with adapters, of all their factors instead."""
    if strategy.config.lora is not None:
        return [factor.clone() for _, factor in strategy.adapters()]
    return [values.detach().to("cpu", copy=True) for _, values in strategy.owned()]


def _pairs(factors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each adapter's A and B, which follow each other."""
    return list(zip(factors[::2], factors[1::2], strict=True))


def merge_metrics(strategy: Strategy) -> dict[str, float]:
    """Of the elements that the last counted merge of an online merging optimizer should move, the
    share that rounding left unchanged, over all workers (zero3: only its last group of parameters).
    Empty for other optimizers and before the first merge. Every rank must call.
    """
    if not isinstance(strategy.optimizer, OnlineMergingAdamW):
        return {}
    num_unchanged, num_merged = add_up(strategy.optimizer.merge_counts().double()).tolist()
    return {"unchanged_share": num_unchanged / num_merged} if num_merged else {}


def add_up(values: Tensor) -> Tensor:
    """Sum values over the workers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.to("cuda") if dist.get_backend() == "nccl" else values
        dist.all_reduce(values)
    return values
