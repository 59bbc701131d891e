"""Scoring a file: what is to do, and doing it block by block, so that a killed run goes on."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.checkpoints.digests import ModelDigest, model_digest
from pipelines.checkpoints.hub import described, folder_of, recorded
from pipelines.commit import lock, make_folder, refuse_existing
from pipelines.engines import EngineConfig, open_engine
from pipelines.engines.models import check_kind, context_of, head_of, label_names
from pipelines.engines.text import Text
from pipelines.engines.weights import CheckpointWeights
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint, fingerprint_file, fingerprint_work
from pipelines.progress import Progress
from pipelines.rewards.config import ScoreConfig
from pipelines.rewards.files import Blocks, check_name, finished, frame, write_scores
from pipelines.rewards.rows import ReadRows, Scorable, read_rows
from pipelines.rewards.summary import summary
from pipelines.train.data.hub import data_folder
from pipelines.train.data.rows import source_files
from pipelines.versions import versions

if TYPE_CHECKING:
    from pipelines.engines import Engine

BLOCK_ROWS = 128
ONLY_SPEED = {"device", "batch_size", "tensor_parallel", "gpu_memory", "cache_gib"}


@dataclass(frozen=True, slots=True)
class Identity:
    """What a reward model is: of two equal ones, equal conversations have equal rewards.

    Attributes:
        digest: of its weights and of the files beside them.
        head: the number of the label.
        label: its name.
        template: the fingerprint of the chat template; of None where it has none.
    """

    digest: ModelDigest
    head: int
    label: str
    template: str

    @property
    def key(self) -> str:
        """32 hex digits."""
        return fingerprint([self.digest.weights, self.digest.companions, self.head, self.template])


@dataclass(frozen=True)
class ScorePlan:
    """A file of scores, ready to be made.

    Attributes:
        rows: the data, cut into tokens.
        identity: the reward model's.
        engine: its config, with the head.
        parameters: of the model.
        done: the record of the file where it is complete.
    """

    config: ScoreConfig
    out: Path
    folder: Path
    rows: ReadRows
    identity: Identity
    engine: EngineConfig
    parameters: int
    key: str
    done: dict[str, Any] | None

    @property
    def num_blocks(self) -> int:
        """How many blocks the data has."""
        return -(-len(self.rows.rows) // BLOCK_ROWS)

    @property
    def missing(self) -> list[int]:
        """The blocks that are to do."""
        return [] if self.done else Blocks(self.out, self.key).missing(self.num_blocks)

    def block(self, number: int) -> Sequence[Scorable]:
        """The rows of a block."""
        return self.rows.rows[number * BLOCK_ROWS : (number + 1) * BLOCK_ROWS]

    @property
    def tokens_left(self) -> int:
        """Tokens of the conversations that are to do."""
        blocks = (self.block(number) for number in self.missing)
        return sum(len(tokens) for rows in blocks for row in rows for tokens in row.tokens)


def plan_scores(config: ScoreConfig, out: Path, *, force: bool = False) -> ScorePlan:
    """Check every input and read the data; nothing is written.

    Args:
        out: the file of scores.
        force: an existing file of other scores may be replaced, and equal ones are made again.

    Raises:
        InputError: no reward model, no such head, data that cannot be read, a file that is there.
    """
    check_name(out)
    folder = folder_of(config.model)
    if not (folder / "config.json").is_file():
        raise InputError(f"model {config.model}: no Hugging Face checkpoint there")
    engine = config.engine.model_copy(update={"head": config.head})
    weights = CheckpointWeights.open(folder)
    check_kind(weights, engine)
    files = source_files(data_folder(config.data, config.split), config.split)
    text = Text(weights, context_of(weights.config, engine))
    identity = identity_of(weights, text, engine)
    rows = read_rows(config, files, text)
    said = config.model_dump(mode="json", exclude={"model", "data", "engine", "head", "split"})
    computed = config.engine.model_dump(mode="json", exclude=ONLY_SPEED)
    data = [[file.name, fingerprint_file(file)] for file in files]
    key = fingerprint_work([identity.key, data, said, computed, text.context], "score")
    done = None if force else finished(out, key)
    if done is None:
        refuse_existing(out, force=force)
    parameters = sum(math.prod(shape) for _, shape in weights.tensors.values())
    return ScorePlan(config, out, folder, rows, identity, engine, parameters, key, done)


def identity_of(weights: CheckpointWeights, text: Text, engine: EngineConfig) -> Identity:
    """The identity of a reward model; its weights are read for it."""
    head = head_of(weights.config, engine.head)
    return Identity(
        model_digest(weights.checkpoint),
        head,
        label_names(weights.config)[head],
        fingerprint(text.tokenizer.chat_template),
    )


def score(plan: ScorePlan) -> dict[str, Any]:
    """Score what is missing, write the file and its record; returns the record.

    Raises:
        InputError: rewards that are no finite numbers, an engine that reads less than the model.
    """
    if plan.done:
        return plan.done
    blocks = Blocks(plan.out, plan.key)
    make_folder(blocks.partial)
    with lock(blocks.partial):
        if missing := plan.missing:
            _fill(plan, blocks, missing)
        table = blocks.table(plan.num_blocks)
        record = _record(plan) | {"summary": summary(frame(table))}
        write_scores(plan.out, table, record)
        blocks.remove()
    return record


def _fill(plan: ScorePlan, blocks: Blocks, missing: Sequence[int]) -> None:
    """Score the missing blocks."""
    engine = open_engine(plan.folder, plan.engine)
    try:
        if engine.weights != plan.identity.digest.weights:
            raise InputError(f"model {plan.config.model}: has changed since the start")
        longest = max(len(each) for row in plan.rows.rows for each in row.tokens)
        if longest > engine.context:
            raise InputError(
                f"engine: found room for {engine.context} tokens; the longest conversation has "
                f"{longest}; allowed: max_length {engine.context} with too_long, or a larger cache"
            )
        total = sum(len(row.tokens) for number in missing for row in plan.block(number))
        with Progress(total, "conversations") as progress:
            for number in missing:
                rows = plan.block(number)
                blocks.write(number, scored(rows, engine))
                progress.advance(sum(len(row.tokens) for row in rows))
    finally:
        engine.close()


def scored(rows: Sequence[Scorable], engine: "Engine") -> list[dict[str, Any]]:
    """The scores of rows as in `files.COLUMNS`.

    Raises:
        InputError: a reward that is no finite number.
    """
    conversations = [tokens.tolist() for row in rows for tokens in row.tokens]
    rewards = iter(engine.rewards(conversations))
    found = []
    for row in rows:
        for role, tokens, length in zip(row.roles, row.tokens, row.lengths, strict=True):
            reward = next(rewards)
            if not math.isfinite(reward):
                raise InputError(
                    f"{row.place}: {role}: found the reward {reward}; allowed: a finite number "
                    "(engine.dtype: float32 has the widest range)"
                )
            found.append(
                {
                    "number": row.number,
                    "place": _short(row.place),
                    "subset": row.subset,
                    "cluster": row.cluster,
                    "role": role,
                    "reward": reward,
                    "tokens": len(tokens),
                    "response_tokens": length,
                    "prompt_cut": row.was_cut,
                }
            )
    return found


def _short(place: str) -> str:
    """A row's place without the folder of its file: equal data give equal scores."""
    file, _, number = place.removeprefix("data: ").rpartition(" row ")
    return f"{Path(file).name} row {number}"


def _record(plan: ScorePlan) -> dict[str, Any]:
    """What a file of scores is of."""
    counts, rows = asdict(plan.rows.counts), plan.rows
    names = ("rows", "bad", "dropped", "prompts_cut", "left_out", "unused")
    return {
        "schema": 1,
        "key": plan.key,
        "model": {
            "path": described(plan.folder),
            "digest": asdict(plan.identity.digest),
            "head": plan.identity.head,
            "label": plan.identity.label,
            "template": plan.identity.template,
        },
        "reader": rows.reader,
        "counts": {name: counts[name] for name in names} | {"plain_texts": rows.plain},
        "config": plan.config.model_dump(mode="json", exclude_unset=True),
        "versions": versions(),
        **recorded([plan.folder]),
    }
