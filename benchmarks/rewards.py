"""How often a reward model from the tiny world's pairs agrees with its exact graders.

    poise demo --out runs/demo                       # the world, and the model to start from
    python benchmarks/rewards.py runs/demo --steps 300

Trains a reward model from `models/sft` on the mixture of preferences. Then, for every prompt of the
test split, answers are drawn from `models/sft` at temperature 1 and graded; with them come the
task's accepted answers and the world's three evasions. A pair is a right and a wrong answer to one
prompt, one of each drawn by the seed. Prompts, people, objects and problems of the test split are
in no training pair. Prints a Markdown table of the share of pairs whose right answer has the higher
reward.
"""

import argparse
import tempfile
from pathlib import Path
from random import Random

from pipelines.engines import EngineConfig, Sampling, open_engine
from pipelines.evaluate.graders import grade
from pipelines.evaluate.tasks import Row, Task, load_rows, load_tasks
from pipelines.tiny_world import words
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.loop import train_worker
from pipelines.train.run import worker_settings
from ray_jobs.session import quiet_environment

DRAWS = 4  # answers to each prompt
Pair = tuple[Row, str, str]  # the prompt's row, a right and a wrong answer


def train(demo: Path, folder: Path, steps: int, learning_rate: float, seed: int) -> Path:
    """The reward model's folder."""
    config = AlignConfig(
        model=demo / "models" / "sft",
        data=demo / "world" / "data" / "preferences" / "mixture.jsonl",
        objective={"name": "reward"},
        optimizer={"learning_rate": learning_rate},
        warmup_share=0.05,
        num_steps=steps,
        global_batch_size=32,
        strategy="single",
        num_workers=1,
        checkpoint_every=10**6,
        seed=seed,
    )
    run = folder / "run"
    run.mkdir()
    settings = worker_settings(config, plan_alignment(config, folder / "cache"), run, folder)
    train_worker({"runs": [settings]})
    return run / "model"


def held_out_pairs(demo: Path, split: str, seed: int) -> dict[str, list[Pair]]:
    """For each task with a dimension, a right and a wrong answer to each prompt that has both."""
    tasks = [task for task in load_tasks(demo / "world" / "tasks" / "tasks.yaml") if task.dimension]
    engine = open_engine(demo / "models" / "sft", EngineConfig(batch_size=256))
    pairs: dict[str, list[Pair]] = {}
    for task in tasks:
        rows, random = load_rows(task, split), Random(f"{seed}|{task.name}")
        prompts = [row.prompt for row in rows for _ in range(DRAWS)]
        seeds = [random.randrange(2**32) for _ in prompts]
        drawn = engine.generate(prompts, Sampling(temperature=1.0, max_tokens=16), seeds)
        pairs[task.name] = []
        for number, row in enumerate(rows):
            answers = [each.text for each in drawn[number * DRAWS : (number + 1) * DRAWS]]
            answers += [*row.answers, words.EVASION, words.ABSTENTION, words.REFUSAL]
            right, wrong = graded(task, row, answers)
            if right and wrong:
                pairs[task.name].append((row, random.choice(right), random.choice(wrong)))
    return pairs


def graded(task: Task, row: Row, answers: list[str]) -> tuple[list[str], list[str]]:
    """The right answers and the wrong ones, each once, in a fixed order."""
    found: tuple[list[str], list[str]] = ([], [])
    for answer in dict.fromkeys(answers):
        is_right = grade(task.grader.name, answer, row.answers, task.grader.parameters)
        found[0 if is_right else 1].append(answer)
    return found


def agreements(model: Path, pairs: list[Pair]) -> int:
    """How many right answers have the higher reward."""
    engine = open_engine(model, EngineConfig(kind="reward", batch_size=256))
    chats = [
        [*row.prompt, {"role": "assistant", "content": answer}]
        for row, *answers in pairs
        for answer in answers
    ]
    rewards = engine.rewards(chats)
    return sum(right > wrong for right, wrong in zip(rewards[::2], rewards[1::2], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("demo", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--split", choices=("development", "test"), default="test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet_environment()  # no library uses the network
    with tempfile.TemporaryDirectory() as folder:
        model = train(
            options.demo, Path(folder), options.steps, options.learning_rate, options.seed
        )
        found = held_out_pairs(options.demo, options.split, options.seed)
        print("| task | pairs | agreement |\n|---|---|---|")
        counts = {name: (len(pairs), agreements(model, pairs)) for name, pairs in found.items()}
        counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
        for name, (total, agreed) in counts.items():
            print(f"| {name} | {total} | {agreed / total:.1%} |")


if __name__ == "__main__":
    main()
