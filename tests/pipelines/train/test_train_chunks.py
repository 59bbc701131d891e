"""Log-probabilities by chunks of positions. Oracle: autograd through all logits of a batch, in this
process and, for each strategy, a run whose logits are whole.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_workers_in_turn
from safetensors.torch import load_file
from torch import Tensor
from training_files import align_config, metrics, preference_rows, run_here, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from pipelines.errors import InputError
from pipelines.train.data.batches import pad_together
from pipelines.train.head import Head, log_probabilities
from pipelines.train.material import material
from pipelines.train.metrics import MEASURED
from pipelines.train.objectives import DrawnTokens, draw_tokens
from pipelines.train.scoring import Draws
from pipelines.train.strategy_table import STRATEGIES
from tests.hub_models import ARCHITECTURES, LLAMA_LIKE, random_model
from tests.tiny_models import save_tiny_llama


def whole(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(sequences, length - 1) log-probabilities from all logits."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return logits.gather(-1, ids[:, 1:, None])[..., 0]


def by_chunks(model: PreTrainedModel, ids: Tensor, chunk: int) -> Tensor:
    """The same."""
    head = Head(model)

    def body(states: Tensor) -> Tensor:
        return log_probabilities(head, states[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), chunk)

    values, _ = head.instead(lambda: model(input_ids=ids, use_cache=False), body)
    return values.view(len(ids), -1)


def gradients(model: PreTrainedModel, values: Tensor) -> dict[str, Tensor]:
    """Of a sum of log-probabilities with random weights."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    (values * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check_equal(model: PreTrainedModel, chunk: int = 4) -> None:
    """Values and gradients to 1e-6 of the largest."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (3, 11), generator=torch.Generator().manual_seed(0))
    one, other = whole(model, ids), by_chunks(model, ids, chunk)
    torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)
    expected, found = gradients(model, one), gradients(model, other)
    assert expected.keys() == found.keys()
    largest = max(each.abs().max() for each in expected.values())
    for name, each in expected.items():
        assert (found[name] - each).abs().max() <= 1e-6 * largest, name


def misfit(model: PreTrainedModel) -> str:
    """Why a model has no chunks."""
    run = lambda ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    return Head(model).misfit(run, torch.device("cpu"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    """Every architecture has chunks, and they are exact."""
    model = random_model(name).eval()
    assert misfit(model) == ""
    check_equal(model)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gemma2", {"final_logit_softcapping": 0.1}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_what_models_do_to_their_logits(name: str, fields: dict[str, float]) -> None:
    """A soft cap, a factor, a divisor: what they make of the logits is not the plain product."""
    config = AutoConfig.for_model(
        name, **LLAMA_LIKE, head_dim=16, vocab_size=64, pad_token_id=0, **fields
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert misfit(model) == ""
    ids = torch.arange(8).unsqueeze(0)
    raw = model.lm_head(model.model(ids).last_hidden_state)
    assert (raw - model(ids).logits).abs().max() > 0.05
    check_equal(model)


class Centred(LlamaForCausalLM):
    """Its logits depend on all positions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(1, keepdim=True)
        return output


class Scaled(LlamaForCausalLM):
    """A weight that is trained stands behind its head."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.model.norm.weight[0]
        return output


class Twice(LlamaForCausalLM):
    """Its head is called twice."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Centred, "its logits are not those of one position after another"),
        (Scaled, "weights that are trained stand behind its head"),
        (Twice, "its head is not called once with one vector for each token"),
    ],
)
def test_models_without_chunks(kind: type[LlamaForCausalLM], reason: str) -> None:
    """What would not be exact is found out."""
    model = kind(random_model("llama").config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    assert misfit(model) == reason


@settings(max_examples=15, deadline=None)
@given(chunk=st.integers(1, 40), tied=st.booleans())
def test_every_size_of_chunk(chunk: int, tied: bool) -> None:
    """One position at a time, or all at once; heads that are the embedding too."""
    check_equal(random_model("llama", tie_word_embeddings=tied), chunk)


def assert_same(one: Path, other: Path, *, rel: float = 1e-5) -> None:
    """Two runs: each step's numbers, and the weights."""
    for now, before in zip(metrics(one), metrics(other), strict=True):
        for name in now.keys() - set(MEASURED):
            assert now[name] == pytest.approx(before[name], rel=rel, abs=1e-5), name
    expected = load_file(other / "model" / "model.safetensors")
    for name, tensor in load_file(one / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-6)


SMALL = {"learning_rate": 1e-3, "eps": 1e-4}  # with a smaller eps Adam makes rounding large
KINDS: dict[str, dict[str, Any]] = {
    "stored": {},
    "on the fly": {"reference_log_probabilities": "on_the_fly"},
    "kto": {"objective": {"name": "kto"}},
    "orpo, micro-batches": {"objective": {"name": "orpo"}, "micro_batch_size": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "held-out rows": {"evaluation": {"share": 0.25, "every": 1}},
    "adapters": {"lora": {"rank": 4, "target_modules": ["q_proj", "lm_head"]}},
    "adapters, on the fly": {
        "lora": {"rank": 4, "target_modules": ["q_proj", "lm_head"]},
        "reference_log_probabilities": "on_the_fly",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_runs(kind: str, tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """A run by chunks is the same run, with every kind of loss and reference."""
    fields = {"optimizer": SMALL, "num_steps": 3} | KINDS[kind]
    runs = [
        run_here(
            align_config(tiny_llama, preferences, logits_chunk=chunk, **fields),
            tmp_path / str(chunk),
        )
        for chunk in (7, None)
    ]
    assert_same(*runs)


def test_packed_rows(tiny_llama: Path, tmp_path: Path) -> None:
    """Several rows in a sequence."""
    rows = [{"messages": row["prompt"] + row["chosen"]} for row in preference_rows(16)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    fields = {"objective": {"name": "sft"}, "packing": True, "max_length": 64, "num_steps": 2}
    runs = [
        run_here(
            align_config(tiny_llama, data, logits_chunk=chunk, optimizer=SMALL, **fields),
            tmp_path / str(chunk),
        )
        for chunk in (7, None)
    ]
    assert_same(*runs)


def test_everything_by_small_chunks(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks by default, where logits are too many: the stored reference has them, too. Its drawn
    tokens may be others.
    """
    config = align_config(tiny_llama, preferences, optimizer=SMALL, num_steps=2)
    whole = run_here(config, tmp_path / "whole" / "run")
    monkeypatch.setattr("pipelines.train.head.MAX_LOGITS", 1000)
    chunked = run_here(config, tmp_path / "chunked" / "run")
    for now, before in zip(metrics(chunked), metrics(whole), strict=True):
        for name in ("loss", "margin", "chosen_log_probability", "gradient_norm"):
            assert now[name] == pytest.approx(before[name], rel=1e-5, abs=1e-5), name
    assert metrics(chunked)[1]["kl_per_token"] > 0


def test_draws_by_chunks() -> None:
    """A sequence draws from its own seed, over the cuts of its positions."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 50, generator=draw)
    marks = [np.array([0, 0, *[1] * 7]), np.array([0, 0, 0, *[1] * 6])]
    batch = pad_together([(np.arange(9), each) for each in marks], 0, "cpu")
    logits = logits[:, batch.first_scored :]
    learned = batch.scored_response[:, 1:].bool()
    rows = logits[:, :-1][learned]

    def drawn(*cuts: int) -> DrawnTokens:
        draws = Draws(batch, [5, 6])
        for start, stop in itertools.pairwise([0, *cuts, len(rows)]):
            part = slice(start, stop)
            draws.part(rows[part], rows[part].logsumexp(-1), part)
        return draws.tokens

    whole = draw_tokens(logits, batch, [5, 6])
    for cuts in ((), (7,), (3, 9), range(1, len(rows))):
        found = drawn(*cuts)
        assert torch.equal(found.ids, whole.ids)
        torch.testing.assert_close(found.log_probability, whole.log_probability)


def test_half_precision(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """In bf16 losses and gradients are those of whole logits up to the rounding of bf16."""
    fields = {"optimizer": SMALL, "num_steps": 2, "precision": "bf16"}
    runs = [
        run_here(
            align_config(tiny_llama, preferences, logits_chunk=chunk, **fields),
            tmp_path / str(chunk),
        )
        for chunk in (7, None)
    ]
    for now, before in zip(*map(metrics, runs), strict=True):
        for name in ("loss", "gradient_norm", "chosen_log_probability"):
            assert now[name] == pytest.approx(before[name], rel=1e-2), name


def test_chunks_are_a_matter_of_memory(tiny_llama: Path, preferences: Path) -> None:
    """They do not make another run, and a run continues with others."""
    one, other = (align_config(tiny_llama, preferences, logits_chunk=c) for c in (7, None))
    assert material(one) == material(other)


def test_a_config_asks_for_chunks_in_vain(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error if it does; else a line for the user, and whole logits."""
    monkeypatch.setattr(Head, "misfit", lambda *_: "it is odd")
    with pytest.raises(InputError) as caught:
        run_here(align_config(tiny_llama, preferences, logits_chunk=7), tmp_path / "asked")
    reason = f"{tiny_llama}: logits of whole micro-batches, because it is odd"
    assert str(caught.value) == f"logits_chunk: has no effect on {reason}"
    monkeypatch.setattr("pipelines.train.head.MAX_LOGITS", 1000)
    run = run_here(align_config(tiny_llama, preferences), tmp_path / "not")
    assert (run / "remark").read_text() == reason
    assert len(metrics(run)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero3"])
def test_sharded_runs(strategy: str, tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """Two workers, whose micro-batches have other numbers of chunks; with a tied head."""
    model = save_tiny_llama(tmp_path / "tied", tied=True)
    fields: dict[str, Any] = {"optimizer": SMALL, "num_steps": 2, "micro_batch_size": 2}
    both = {"strategy": strategy, "num_workers": 2}
    configs = {
        tmp_path / f"{place}-{chunk}": align_config(
            model, preferences, logits_chunk=chunk, **fields, **both, **KINDS[kind]
        )
        for place, kind in (("stored", "stored"), ("live", "on the fly"))
        for chunk in (5, None)
    }
    if STRATEGIES[strategy].takes_adapters:
        kind = KINDS["adapters, on the fly"]
        for chunk in (5, None):
            config = align_config(
                tiny_llama, preferences, logits_chunk=chunk, **fields, **both, **kind
            )
            configs[tmp_path / f"adapters-{chunk}"] = config
    run_workers_in_turn(configs)
    for place in {folder.name.split("-")[0] for folder in configs}:
        assert_same(tmp_path / f"{place}-5", tmp_path / f"{place}-None")
