"""Tiny models, prompts and a scorer for tests of a choice; tests change copies, never these."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from operators.statistics import clustered_mean
from pipelines.config import check
from pipelines.evaluate.interface import Number, Sample
from pipelines.evaluate.scoring import ScoredTask, conversations
from pipelines.expo import ExpoConfig, ExpoPlan, plan_expo
from tests.pipelines.engines.references import save_chatty
from tests.pipelines.rewards.reward_models import save_reward_model, write_rows

PROMPTS = {"development": 12, "test": 10}
GREEDY = {"temperature": 0, "presence_penalty": 0, "frequency_penalty": 0}
ALPHAS = [0.0, 0.5, 1.5, 3.0]


def save_world(root: Path) -> Path:
    """An SFT model, an aligned one at some distance, a reward model, prompts, merges."""
    save_chatty(root / "sft", 0)
    shutil.copytree(root / "sft", root / "dpo")
    tensors, draw = load_file(root / "dpo/model.safetensors"), torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        tensor.add_(torch.randn(tensor.shape, generator=draw), alpha=0.05)
    save_file(tensors, root / "dpo/model.safetensors", {"format": "pt"})
    save_reward_model(root / "reward", max_position_embeddings=512)
    letters = random.Random(0)
    for split, count in PROMPTS.items():
        prompts = [" ".join(letters.choices("abcdefghij", k=1 + n % 5)) for n in range(count)]
        write_rows(root / f"{split}.jsonl", [{"prompt": prompt} for prompt in prompts])
    models = [{"model": str(root / "dpo")}]
    merge = {"merge_method": "expo", "base_model": str(root / "sft"), "models": models}
    (root / "expo.yaml").write_text(yaml.safe_dump(merge))
    merge |= {"merge_method": "ties", "parameters": {"density": 0.5}}
    (root / "ties.yaml").write_text(yaml.safe_dump(merge))
    return root


def fields_of(root: Path, **changes: Any) -> dict[str, Any]:
    """A config's fields: ExPO, greedy, 16 tokens."""
    return {
        "merge": str(root / "expo.yaml"),
        "values": ALPHAS,
        "reward": str(root / "reward"),
        "data": str(root / "development.jsonl"),
        "max_new_tokens": 16,
        "decoding": GREEDY,
        **changes,
    }


def plan_of(root: Path, length: float | None = None, **changes: Any) -> ExpoPlan:
    """A plan; with `length`, its reward is `-|words - length|` instead of a model's."""
    plan = plan_expo(check(fields_of(root, **changes), ExpoConfig, "expo.yaml"))
    if length is None:
        return plan
    return replace(plan, task=ScoredTask("reward", plan.task.answered, LengthScorer(length)))


class LengthScorer:
    """`-|words of the answer - length|` as a scorer.

    Attributes:
        num_scored: answers that it was given.
    """

    remark, engine, needs_folder = "", None, False

    def __init__(self, length: float) -> None:
        self.length, self.num_scored = length, 0
        self.fingerprint = f"length {length}"
        self.described = {"reward": {"path": "length", "label": "length"}}

    def num_calls(self, documents: int) -> int:
        return 0

    def check(self, documents: int) -> None: ...

    def score(self, samples: Sequence[Sample], folder: str) -> list[Sample]:
        self.num_scored += len(samples)
        found = []
        for sample in samples:
            [conversation] = conversations(sample)
            words = len(conversation[-1]["content"].split())
            values = {"reward": -abs(words - self.length), "reward_tokens": float(words)}
            found.append(replace(sample, requests=[], answers=[], values=values))
        return found

    def numbers(self, samples: Sequence[Sample]) -> dict[str, Number]:
        clusters = [sample.cluster for sample in samples]
        return {
            name: Number(*clustered_mean([s.values[name] for s in samples], clusters), len(samples))
            for name in ("reward", "reward_tokens")
        }

    def notes(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


def prompts_of(root: Path, split: str = "development") -> list[str]:
    return [json.loads(line)["prompt"] for line in (root / f"{split}.jsonl").open()]
