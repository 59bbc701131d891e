"""Rewards as a task's metric: stored answers are scored by a reward model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from operators.statistics import clustered_mean
from pipelines.engines import EngineConfig
from pipelines.engines.interface import Message, Sampling
from pipelines.errors import InputError
from pipelines.evaluate.conversations import Conversation, ConversationTask, file_of_split
from pipelines.evaluate.harness import load_tasks
from pipelines.evaluate.interface import EvaluationTask, Number, Sample
from pipelines.evaluate.library_task import LibraryTask
from pipelines.evaluate.scoring import ScoredTask, conversations
from pipelines.fingerprint import fingerprint
from pipelines.rewards.model import RewardModel, check_finite
from pipelines.rewards.rewarded import RewardedSet
from pipelines.rewards.summary import correlation
from pipelines.train.data.hub import data_folder
from pipelines.train.data.rows import parts_of, read_part, source_files
from pipelines.train.data.tokens import TooLong, fit, tokenize
from pipelines.train.rows.examples import Example
from pipelines.train.rows.messages import ROLES, Messages, normal_messages

if TYPE_CHECKING:
    from pipelines.engines import Engine
    from pipelines.evaluate.config import EvaluateConfig


class RewardScorer:
    """A `Scorer` whose values are rewards.

    The metrics are `reward`, and `reward_tokens`: the length of the answers in the reward model's
    tokens, since many reward models like long answers. Of several answers to one document both
    are means.

    Args:
        too_long: of conversations that the model cannot read: error, or cut_prompt, which takes
            tokens from their beginnings and counts them.
    """

    remark = ""
    needs_folder = False

    def __init__(self, model: RewardModel, too_long: TooLong = "error") -> None:
        if not model.text.tokenizer.chat_template:
            raise InputError(f"model {model.folder}: its tokenizer has no chat template")
        self._model, self._too_long = model, too_long
        self._running: Engine | None = None
        self.engine: EngineConfig | None = model.engine
        self.fingerprint = fingerprint(["reward", model.key, model.text.context, too_long])
        self.described = {"reward": model.described, "too_long": too_long}

    def num_calls(self, documents: int) -> int:
        """As `Scorer.num_calls`: none."""
        return 0

    def check(self, documents: int) -> None:
        """As `Scorer.check`: the model is checked when it is opened."""

    def score(self, samples: Sequence[Sample], folder: str) -> list[Sample]:
        """As `Scorer.score`."""
        cut = [
            [self._tokens(each, sample.id) for each in conversations(sample)] for sample in samples
        ]
        if self._running is None:
            self._running = self._model.start()
        rewards = iter(self._running.rewards([ids for own in cut for ids, _, _ in own]))
        found = []
        for sample, own in zip(samples, cut, strict=True):
            values = [next(rewards) for _ in own]
            for value in values:
                check_finite(value, f"document {sample.id}")
            numbers = {
                "reward": sum(values) / len(values),
                "reward_tokens": sum(length for _, length, _ in own) / len(own),
                "prompt_cut": float(any(was_cut for _, _, was_cut in own)),
            }
            found.append(replace(sample, requests=[], answers=values, values=numbers))
        return found

    def _tokens(self, messages: Sequence[Message], document: str) -> tuple[list[int], int, bool]:
        """A conversation's tokens, those of its last answer alone, and whether it was cut."""
        turns: Messages = [dict(each) for each in messages]
        example = Example(turns[:-1], (turns[-1:],))
        try:
            row, was_cut = fit(
                tokenize(example, self._model.text.tokenizer),
                self._model.text.context,
                self._too_long,
            )
        except InputError as error:
            raise InputError(f"document {document}: reward model: {error}") from None
        assert row is not None  # nothing is dropped
        [sequence] = row.sequences
        return sequence.ids, sum(sequence.response), was_cut

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        """As `Scorer.numbers`: means with errors by cluster."""
        clusters = [sample.cluster for sample in samples]
        found = {}
        for metric in ("reward", "reward_tokens"):
            values = [sample.values[metric] for sample in samples]
            found[metric] = Number(*clustered_mean(values, clusters), len(samples))
        return found

    def notes(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """As `Scorer.notes`: how rewards go with length, and how many prompts were cut."""
        lengths, rewards = (
            [sample.values[metric] for sample in samples] for metric in ("reward_tokens", "reward")
        )
        cut = int(sum(sample.values["prompt_cut"] for sample in samples))
        return {"correlation_with_length": correlation(lengths, rewards), "prompts_cut": cut}

    def close(self) -> None:
        """As `Scorer.close`."""
        if self._running is not None:
            self._running.close()
        self._running = None


def rewarded_task(entry: RewardedSet, config: "EvaluateConfig") -> ScoredTask:
    """The task of an entry of `tasks:`.

    Raises:
        InputError: no reward model, or a task or data without prompts that are answered in words.
    """
    model = RewardModel.open(entry.reward, entry.head, entry.engine)
    scorer = RewardScorer(model, entry.too_long)
    if entry.of is not None:
        answered: EvaluationTask = _library_task(entry.of, config)
        name = entry.name or f"{answered.name}_reward"
    else:
        name = entry.name or "reward"
        answered = _prompts(entry, f"{name}-answers", config)
    if name == answered.name:
        raise InputError(f"tasks: name: found {name}, the answered task's; allowed: another name")
    return ScoredTask(name, answered, scorer)


def _library_task(of: str | dict[str, Any], config: "EvaluateConfig") -> LibraryTask:
    """The task whose answers are scored."""
    tasks = load_tasks(
        [of], config.split, limit=config.limit, seed=config.seed, allow_code=config.allow_code
    )
    if len(tasks) != 1:
        named = ", ".join(task.name for task in tasks)
        raise InputError(f"tasks: of: found {len(tasks)} tasks ({named}); allowed: one")
    [task] = tasks
    if task.output_type != "generate_until":
        raise InputError(
            f"tasks: of: {task.name}: is of {task.output_type}; allowed: a task that is answered "
            "in words (generate_until)"
        )
    if task.chat.wanted:
        raise InputError(
            f"tasks: of: {task.name}: its prompts are in the chat template of the answering model, "
            "which a reward model does not know; allowed: a task with chat false, or data"
        )
    return LibraryTask(task, config.long_prompts)


def _prompts(entry: RewardedSet, name: str, config: "EvaluateConfig") -> ConversationTask:
    """The prompts of a file, answered in a chat."""
    file = file_of_split(entry.data, config.split)
    if file is None:
        raise InputError(f"tasks: data: {entry.data}: has no {config.split} split")
    given: Mapping[Any, str] = entry.columns
    names = {each: given.get(each, each) for each in ("prompt", "id", "cluster")}
    sampling = entry.decoding.sampling(entry.max_new_tokens)
    rows: list[Conversation] = []
    for part in parts_of(source_files(data_folder(file, None))):
        for number, row in read_part(part):
            if len(rows) == config.limit:
                break
            place = f"data: {part.file} row {number}"
            rows.append(_conversation(row, names, sampling, place, str(len(rows))))
    if not rows:
        raise InputError(f"data: {file}: holds no rows")
    return ConversationTask(name, rows, seed=config.seed)


def _conversation(
    row: Any, names: Mapping[str, str], sampling: Sampling, place: str, number: str
) -> Conversation:
    """A row's prompt. Rows with the same prompt are one cluster unless a column says otherwise."""
    if isinstance(row, InputError):
        raise InputError(f"{place}: {row}")
    if not isinstance(row, dict) or names["prompt"] not in row:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{place}: has no column {names['prompt']!r}; found: {found}")
    prompt = row[names["prompt"]]
    if isinstance(prompt, str) and prompt.strip():
        prompt = [{"role": "user", "content": prompt}]
    is_list = isinstance(prompt, list) and prompt
    messages = normal_messages(prompt, ROLES, names["prompt"]) if is_list else []
    if not messages or messages[-1]["role"] != "user":
        raise InputError(
            f"{place}: {names['prompt']}: found {prompt!r}"[:160]
            + "; allowed: a text, or messages of which the last is the user's"
        )
    cluster = row.get(names["cluster"])
    return Conversation(
        id=str(row.get(names["id"], number)),
        cluster=fingerprint(messages) if cluster is None else str(cluster),
        turns=(messages[-1]["content"],),
        sampling=sampling,
        opening=tuple(messages[:-1]),
    )
