"""Reward models: their loss, the steps under every strategy, and what is written.

Oracle: TRL's RewardTrainer on the same batch and in a short training, transformers' own classes,
and a run in this process.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from processes import run_workers_in_turn
from safetensors.torch import load_file
from training_files import (
    align_config,
    metrics,
    preference_rows,
    run_here,
    seeded_metrics,
    write_rows,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    pipeline,
)

from pipelines.engines import EngineConfig, open_engine
from pipelines.errors import InputError
from pipelines.train import plan_alignment, remarks
from pipelines.train.data import collate, global_batch
from pipelines.train.export_run import export_checkpoint
from pipelines.train.material import material
from pipelines.train.objective_config import ObjectiveConfig
from pipelines.train.objectives import ranked_loss, rewards_of, shares_of
from pipelines.train.run import _unfinished_run
from pipelines.train.strategies.loading import empty_model
from pipelines.train.strategy_table import STRATEGIES
from tests.tiny_models import save_tiny, save_tiny_gpt2, save_tiny_llama

REWARD: dict[str, Any] = {"objective": {"name": "reward"}}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
WEIGHTS = "model/model.safetensors"


def save_reward_model(path: Path, num_labels: int = 1) -> Path:
    """A random Llama with a score head."""
    make = LlamaForSequenceClassification
    return save_tiny(make, path, 4, dtype=torch.float32, num_labels=num_labels, **SIZES)


def loaded(path: Path) -> Any:
    """A reward model with everything that its class needs and nothing else."""
    model, info = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model.eval()


def trainer_of(model: Path, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Any:
    """TRL's trainer with plain settings."""
    from trl import RewardConfig, RewardTrainer

    quiet = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32),
        args=RewardConfig(folder, per_device_train_batch_size=8, **quiet, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


@pytest.mark.parametrize("coefficient", [None, 0.3])
@pytest.mark.parametrize("with_margins", [False, True])
@pytest.mark.parametrize("padding", ["<pad>", "</s>"])
def test_the_loss_is_that_of_trl(
    padding: str, with_margins: bool, coefficient: float | None, tmp_path: Path
) -> None:
    """On a batch, with margins and centring; also where what pads a text is what ends it."""
    model = save_reward_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = padding
    tokenizer.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"pad_token_id": tokenizer.pad_token_id})
    )
    rows = preference_rows(8, seed=3)
    if with_margins:
        rows = [row | {"margin": 0.25 * number - 0.5} for number, row in enumerate(rows)]
    trainer = trainer_of(model, tmp_path / "trl", rows, center_rewards_coefficient=coefficient)
    trainer.model.eval()
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, batch).item()
    data = write_rows(tmp_path / "rows.jsonl", rows)
    table = plan_alignment(align_config(model, data, **REWARD), tmp_path / "cache").table
    ours = collate(table, list(range(8)), tokenizer.pad_token_id, "cpu")
    assert torch.equal(ours.ids, batch["input_ids"])
    objective = ObjectiveConfig(name="reward", center_rewards_coefficient=coefficient)
    with torch.no_grad():
        rewards = rewards_of(trainer.model, ours)
        margins = torch.from_numpy(table.margins)
        shares = shares_of(table, list(range(8)))
        found = ranked_loss(objective, rewards, margins, shares)
    assert found.loss.item() == pytest.approx(theirs, rel=2e-6)
    chosen, rejected = rewards.view(2, -1)
    assert found.metrics["accuracy"] == (chosen > rejected).float().mean()
    assert found.metrics["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-6)


def test_a_run_makes_the_steps_of_trl(preferences: Path, tmp_path: Path) -> None:
    """From a reward model, in micro-batches: the weights that TRL's whole batches end with."""
    model = save_reward_model(tmp_path / "model")
    config = align_config(
        model, preferences, **REWARD, num_steps=5, micro_batch_size=2, schedule="constant"
    )
    run = run_here(config, tmp_path / "run")
    all_rows = [json.loads(line) for line in preferences.read_text().splitlines()]
    batches = [global_batch(len(all_rows), 8, number, config.seed) for number in range(5)]
    rows = [all_rows[index] for batch in batches for index in batch]
    trainer = trainer_of(
        model,
        tmp_path / "trl",
        rows,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=5,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in metrics(run)] == pytest.approx(theirs, abs=2e-4)
    for (name, one), other in zip(
        trainer.model.named_parameters(), loaded(run / "model").parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4, msg=name)
    assert (run / "model" / "config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["llama", "tied in bf16", "gpt2"])
def test_a_language_model_becomes_a_reward_model(
    kind: str, preferences: Path, tmp_path: Path
) -> None:
    """The names that transformers writes, a config that says what it is, a seeded head."""
    if kind == "gpt2":
        model = save_tiny_gpt2(tmp_path / "model")
    else:
        tied = kind != "llama"
        dtype = torch.bfloat16 if tied else torch.float32
        model = save_tiny_llama(tmp_path / "model", tied=tied, dtype=dtype)
    bare = json.loads((model / "config.json").read_text())
    del bare["pad_token_id"]  # as in Llama 3
    (model / "config.json").write_text(json.dumps(bare))
    config = align_config(model, preferences, **REWARD)
    run = run_here(config, tmp_path / "run")
    out = loaded(run / "model")
    its_own = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="auto")
    its_own.save_pretrained(tmp_path / "transformers")
    expected, found = (
        {
            name: (tuple(t.shape), t.dtype)
            for name, t in load_file(path / "model.safetensors").items()
        }
        for path in (tmp_path / "transformers", run / "model")
    )
    assert found == expected
    assert (out.config.num_labels, out.config.pad_token_id) == (1, 0)
    assert type(out).__name__ in out.config.architectures
    losses = [line["loss"] for line in metrics(run)]
    assert losses[0] == pytest.approx(0.693, abs=0.1) and losses[-1] < losses[0]
    assert {"accuracy", "margin", "chosen_reward", "rejected_reward"} < metrics(run)[0].keys()
    (line,) = remarks(config)
    instead = " in place of lm_head.weight" if kind == "llama" else ""
    assert line == (
        f"{model}: becomes a reward model, with a new head (score.weight, drawn by seed){instead}"
    )
    heads = []
    for seed in (0, 0, 1):
        again = align_config(model, preferences, **REWARD, seed=seed)
        heads.append(empty_model(model, again.head)[1].read("score.weight"))
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].float().std() == pytest.approx(0.02, rel=0.5)
    with pytest.raises(InputError, match=r"found .*Classification with labels: 1; allowed"):
        plan_alignment(align_config(run / "model", preferences), tmp_path / "cache")


def test_the_result_answers_everywhere(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """Our engine, transformers' class and its pipeline give one score; it can be trained on."""
    config = align_config(tiny_llama, preferences, **REWARD, num_steps=2)
    out = tmp_path / "run"
    with _unfinished_run(
        tmp_path / ".run.partial", plan_alignment(config, tmp_path / "cache"), force=False
    ):
        run = run_here(config, tmp_path / ".run.partial")
    exported = export_checkpoint(out, tmp_path / "exported")
    assert (exported / "model.safetensors").read_bytes() == (run / WEIGHTS).read_bytes()
    chats = [
        [*row["prompt"], *row[name]]
        for row in preference_rows(3)
        for name in ("chosen", "rejected")
    ]
    engine = open_engine(exported, EngineConfig(kind="reward", batch_size=4))
    rewards = engine.rewards(chats)
    tokenizer, model = AutoTokenizer.from_pretrained(exported), loaded(exported)
    with torch.no_grad():
        for chat, reward in zip(chats, rewards, strict=True):
            ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
            assert reward == pytest.approx(model(**ids).logits.item(), abs=1e-5)
    classify = pipeline("text-classification", model=str(exported), device="cpu")
    text = "hello a b c"
    with torch.no_grad():
        score = model(**tokenizer(text, return_tensors="pt")).logits.item()
    assert classify(text)[0]["score"] == pytest.approx(score, abs=1e-5)
    again = align_config(exported, preferences, **REWARD, num_steps=1)
    start = load_file(exported / "model.safetensors")["score.weight"]
    assert torch.equal(empty_model(exported, again.head)[1].read("score.weight"), start[0])
    assert not list(remarks(again))


@pytest.mark.slow
def test_every_strategy(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """The steps of one process on two workers; one of them has no row of the head under fsdp2."""
    fields: dict[str, Any] = {**REWARD, "micro_batch_size": 2, "num_steps": 4}
    alone = run_here(align_config(tiny_llama, preferences, **fields), tmp_path / "alone" / "run")
    configs = {
        tmp_path / strategy / "run": align_config(
            tiny_llama, preferences, **fields, strategy=strategy, num_workers=2
        )
        for strategy in STRATEGIES
        if strategy != "single"
    }
    run_workers_in_turn(configs)
    expected = load_file(alone / WEIGHTS)
    for run in configs:
        for one, other in zip(metrics(alone), metrics(run), strict=True):
            for name in ("loss", "gradient_norm", "margin"):
                assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (run, name)
        found = load_file(run / WEIGHTS)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
        loaded(run / "model")


def test_adapters(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """The head is trained whole beside them, and the output is an ordinary reward model."""
    config = align_config(tiny_llama, preferences, **REWARD, lora={"rank": 2})
    run = run_here(config, tmp_path / "run")
    head, base = (
        empty_model(tiny_llama, config.head)[1].read("score.weight"),
        load_file(tiny_llama / "model.safetensors"),
    )
    trained = load_file(run / WEIGHTS)
    assert not torch.equal(trained["score.weight"][0], head)
    assert torch.equal(trained["model.norm.weight"], base["model.norm.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.linalg.matrix_rank((trained[name] - base[name]).double(), atol=1e-7) == 2
    loaded(run / "model")
    assert metrics(run)[-1]["loss"] < metrics(run)[0]["loss"]
    whole = seeded_metrics(run)
    assert whole == seeded_metrics(run_here(config, tmp_path / "again"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reference_model": "other"}, "reference_model: has no effect with objective reward"),
        ({"reference_log_probabilities": "on_the_fly"}, "reference_log_probabilities: has no eff"),
        ({"min_chosen_log_ratio": -1.0}, "min_chosen_log_ratio: has no effect with objective rew"),
        ({"objective": {"name": "reward", "beta": 0.1}}, "beta: has no effect on reward; allowed"),
        ({"objective": {"name": ["dpo", "reward"]}}, "name: found 'reward' in a sum; allowed: "),
        (
            {"objective": {"name": "dpo", "center_rewards_coefficient": 0.1}},
            "center_rewards_coefficient: has no effect on dpo; allowed with reward",
        ),
        ({"lora": {"save": "both"}}, "lora.save: found both with objective reward, whose head is "),
        (
            {"lora": {"target_modules": ["score"]}},
            "lora.target_modules: found score, the head that",
        ),
        (
            {"objective": {"name": "dpo"}, "columns": {"margin": "m"}},
            "columns: margin has no effect with objective dpo",
        ),
    ],
)
def test_what_has_no_effect(
    fields: dict[str, Any], message: str, tiny_llama: Path, preferences: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        align_config(tiny_llama, preferences, **(REWARD | fields))


def test_models_and_margins_that_are_refused(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    many = save_reward_model(tmp_path / "many", num_labels=3)
    message = "found LlamaForSequenceClassification with labels: 3; allowed: such a model with one"
    with pytest.raises(InputError, match=message):
        plan_alignment(align_config(many, preferences, **REWARD), tmp_path / "cache")
    first, second = preference_rows(2)
    rows = [first | {"margin": "2"}, second | {"margin": 1}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="row 1: margin: found '2'; allowed: a finite number"):
        plan_alignment(align_config(tiny_llama, data, **REWARD), tmp_path / "cache")


def test_margins_may_be_in_another_column(tiny_llama: Path, tmp_path: Path) -> None:
    """A row without one has 0; other objectives do not read it."""
    rows = [row | {"gap": gap} for row, gap in zip(preference_rows(2), (1.5, None), strict=True)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = align_config(tiny_llama, data, **REWARD, columns={"margin": "gap"})
    table = plan_alignment(config, tmp_path / "cache").table
    assert table.margins.tolist() == [1.5, 0.0]
    others = plan_alignment(align_config(tiny_llama, data), tmp_path / "cache").table
    assert not others.margins.any()


def test_fingerprints_of_other_objectives(tiny_llama: Path, preferences: Path) -> None:
    """Runs of versions without the field are the same runs."""
    config = align_config(tiny_llama, preferences)
    assert "center_rewards_coefficient" not in material(config)["objective"]


def test_the_config_is_what_transformers_makes_of_it(
    tiny_llama: Path, preferences: Path, tmp_path: Path
) -> None:
    """But for the kind of problem, which says that scores are raw."""
    run = run_here(align_config(tiny_llama, preferences, **REWARD, num_steps=1), tmp_path / "run")
    config = AutoConfig.from_pretrained(tiny_llama, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "its own")
    expected, found = (
        json.loads((path / "config.json").read_text())
        for path in (tmp_path / "its own", run / "model")
    )
    assert found == expected | {"problem_type": "regression"}
    assert AutoModelForCausalLM.from_pretrained(tiny_llama).config.architectures  # is as it was
