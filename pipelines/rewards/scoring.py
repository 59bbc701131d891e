"""Scoring a file: what is to do, and doing it block by block, so that a killed run goes on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.checkpoints.hub import recorded
from pipelines.commit import lock, make_folder, refuse_existing
from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint_file, fingerprint_work
from pipelines.progress import Progress
from pipelines.rewards.config import ScoreConfig
from pipelines.rewards.files import Blocks, check_name, finished, write_scores
from pipelines.rewards.model import RewardModel, check_finite
from pipelines.rewards.rows import ReadRows, Scorable, read_rows
from pipelines.rewards.summary import summary
from pipelines.train.data.hub import data_folder
from pipelines.train.data.rows import source_files
from pipelines.versions import versions

if TYPE_CHECKING:
    from pipelines.engines import Engine

BLOCK_ROWS = 128


@dataclass(frozen=True)
class ScorePlan:
    """A file of scores, ready to be made.

    Attributes:
        model: the reward model.
        rows: the data, cut into tokens.
        done: the record of the file where it is complete.
    """

    config: ScoreConfig
    out: Path
    model: RewardModel
    rows: ReadRows
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
    model = RewardModel.open(config.model, config.head, config.engine)
    files = source_files(data_folder(config.data, config.split), config.split)
    rows = read_rows(config, files, model.text)
    said = config.model_dump(mode="json", exclude={"model", "data", "engine", "head", "split"})
    data = [[file.name, fingerprint_file(file)] for file in files]
    key = fingerprint_work([model.key, data, said, model.text.context], "score")
    done = None if force else finished(out, key)
    if done is None:
        refuse_existing(out, force=force)
    return ScorePlan(config, out, model, rows, key, done)


def score(plan: ScorePlan) -> dict[str, Any]:
    """Score what is missing, write the file and its record; returns the record.

    Raises:
        InputError: rewards that are no finite numbers, an engine that reads less than the model.
    """
    if plan.done:
        return plan.done
    blocks = Blocks(plan.out, plan.key)
    make_folder(blocks.partial)
    with lock(blocks.partial), blocks.kept():
        if missing := plan.missing:
            _fill(plan, blocks, missing)
        table = blocks.table(plan.num_blocks)
        record = _record(plan) | {"summary": summary(table.to_pandas())}
        write_scores(plan.out, table, record)
        blocks.remove()
    return record


def _fill(plan: ScorePlan, blocks: Blocks, missing: Sequence[int]) -> None:
    """Score the missing blocks."""
    engine = plan.model.start()
    try:
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
            check_finite(reward, f"{row.place}: {role}")
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
        "model": plan.model.described,
        "reader": rows.reader,
        "counts": {name: counts[name] for name in names} | {"plain_texts": rows.plain},
        "config": plan.config.model_dump(mode="json", exclude_unset=True),
        "versions": versions(),
        **recorded([plan.model.folder]),
    }
