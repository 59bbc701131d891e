"""Models of many architectures as they lie on the hub: what is trained, and what is written.

Oracle: transformers' own model from `from_pretrained`, its autograd, and AdamW.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from processes import run_workers_in_turn
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from training_files import align_config, metrics, run_here
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from pipelines.checkpoints import Checkpoint, ModuleView
from pipelines.errors import InputError
from pipelines.train import AlignConfig, plan_alignment, remarks
from pipelines.train.architecture import meta_model
from pipelines.train.data import collate, global_batch
from pipelines.train.export_run import export_checkpoint
from pipelines.train.run import _unfinished_run
from tests.hub_models import ARCHITECTURES, CLASSES, WEIGHTS, save_as_on_hub
from tests.model_kinds import KINDS

RUN: dict[str, Any] = {
    "num_steps": 2,
    "schedule": "constant",
    # The gradients of keys' biases are 0 but for rounding, which Adam's small eps would make large.
    "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "eps": 1e-4},
}

REFUSED = {
    "RwkvForCausalLM": "transformers' recurrence overwrites values that its gradient needs",
    "PaliGemmaForConditionalGeneration": "its attention reads ahead unless it is given types of "
    "tokens, which rows lack",
}
WITH_IMAGES = [n for n in CLASSES if n in KINDS["text with images"] and n not in REFUSED]
DECODERS = [n for n in CLASSES if n not in (*REFUSED, *WITH_IMAGES)]
ALL = [*ARCHITECTURES, *DECODERS, *WITH_IMAGES]
SIX = {"llama", "gpt2", "qwen3_moe", "mamba", "opt", "LlavaForConditionalGeneration"}
FAST = {*ARCHITECTURES, "LlavaForConditionalGeneration"}
TABLE = Path(__file__).parents[3] / "docs" / "architectures.md"


def loaded(path: Path, **fields: Any) -> Any:
    """As `from_pretrained` loads it."""
    of_images = Checkpoint.open(path).config["architectures"][0] in WITH_IMAGES
    auto = AutoModelForImageTextToText if of_images else AutoModelForCausalLM
    return auto.from_pretrained(path, **fields)


def log_probabilities(model: PreTrainedModel, ids: Tensor, response: Tensor) -> Tensor:
    """Of each sequence's learned tokens, summed; with a mask for the padding."""
    mask = torch.ones_like(ids)
    for row, marks in zip(mask, response, strict=True):
        row[int(marks.nonzero().max()) + 1 :] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    values = logits.gather(-1, ids[:, 1:, None])[..., 0]
    return (values * response[:, 1:]).sum(-1)


def trained_by_hand(
    config: AlignConfig, cache: Path, model: Any = None
) -> tuple[PreTrainedModel, list[float]]:
    """DPO's steps on the loaded model, or on another one that begins equal to the reference."""
    table = plan_alignment(config, cache).table
    model = loaded(config.model, dtype=torch.float32) if model is None else model
    model.eval()  # no dropout
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4, weight_decay=0.1)
    before: dict[int, Tensor] = {}
    batches = [global_batch(table.num_rows, 8, number, config.seed) for number in range(2)]
    for number, rows in enumerate(batches):
        batch = collate(table, rows, 0, "cpu")
        with torch.no_grad():
            before[number] = log_probabilities(model, batch.ids, batch.response)
    losses = []
    for number, rows in enumerate(batches):
        batch = collate(table, rows, 0, "cpu")
        ratios = log_probabilities(model, batch.ids, batch.response) - before[number]
        chosen, rejected = ratios.view(2, -1)
        loss = -nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


def check_run(config: AlignConfig, run: Path, cache: Path) -> None:
    """Losses and weights are those of the steps by hand, and the output is stored as its source."""
    expected, losses = trained_by_hand(config, cache)
    assert [line["loss"] for line in metrics(run)] == pytest.approx(losses, rel=1e-5)
    out = run / "model"
    found, info = loaded(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    start = loaded(config.model)
    moved = 0.0
    for (name, one), other, first in zip(
        expected.named_parameters(), found.parameters(), start.parameters(), strict=True
    ):
        assert (one - other).norm() <= 2e-3 * (one - first).norm() + 1e-6, name
        moved += (other - first).norm().item()
    assert moved > 0.05
    check_files(config.model, out)


def check_files(source: Path, out: Path) -> None:
    """Names, shapes and dtypes are the source's; what is no parameter has its bytes."""
    before, after = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
    described = [{k: (t.shape, t.dtype) for k, t in each.items()} for each in (before, after)]
    assert described[0] == described[1]
    assert (source / "config.json").read_bytes() == (out / "config.json").read_bytes()
    model = meta_model(source)
    view = ModuleView.of(Checkpoint.open(source), model)
    parameters = dict(model.named_parameters())
    for name, tensor in before.items():
        if not parameters.keys() & set(view.naming.parameters_of(name)):
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in ALL]
)
def test_two_steps_in_one_process(name: str, preferences: Path, tmp_path: Path) -> None:
    """Every architecture, as on the hub."""
    model = save_as_on_hub(name, tmp_path / "model")
    config = align_config(model, preferences, **RUN)
    check_run(config, run_here(config, tmp_path / "run"), tmp_path / "cache")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SIX else pytest.mark.slow) for n in ALL]
)
def test_an_adapter_and_an_export(name: str, preferences: Path, tmp_path: Path) -> None:
    """Every architecture: the adapter merged is what PEFT makes of it and the base, and the export
    of the last checkpoint is the run's output.
    """
    model = save_as_on_hub(name, tmp_path / "model")
    lora = {"rank": 2, "alpha": 6.0, "save": "both"}
    config = align_config(model, preferences, **RUN, lora=lora)
    run = tmp_path / ".run.partial"
    with _unfinished_run(run, plan_alignment(config, tmp_path / "cache"), force=False):
        run_here(config, run)
    found = PeftModel.from_pretrained(loaded(model), run / "model" / "adapter")
    expected, own = found.merge_and_unload().state_dict(), loaded(run / "model").state_dict()
    start = loaded(model).state_dict()
    assert own.keys() == expected.keys()
    for key, values in own.items():
        torch.testing.assert_close(values, expected[key], atol=1e-6, rtol=1e-6, msg=key)
    factors = load_file(run / "model" / "adapter" / "adapter_model.safetensors")
    still = [key for key, values in factors.items() if "lora_B" in key and not values.any()]
    assert factors and not still  # each one acts, so each one is trained
    assert any(not torch.equal(values, start[key]) for key, values in own.items())
    check_files(model, run / "model")
    exported = export_checkpoint(tmp_path / "run", tmp_path / "exported")
    for file in (WEIGHTS, "config.json", "adapter/adapter_model.safetensors"):
        assert (exported / file).read_bytes() == (run / "model" / file).read_bytes()


def test_fused_experts_leave_as_they_came(preferences: Path, tmp_path: Path) -> None:
    """The same model in the other layout: the same weights, each in its own layout."""
    runs = []
    for fused in (False, True):
        model = save_as_on_hub("qwen3_moe", tmp_path / f"model-{fused}", fused=fused)
        config = align_config(model, preferences, **RUN)
        runs.append(run_here(config, tmp_path / f"run-{fused}") / "model")
        check_files(model, runs[-1])
    one, other = (AutoModelForCausalLM.from_pretrained(run).state_dict() for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_delta_of_two_layouts(preferences: Path, tmp_path: Path) -> None:
    """Online merging of a mixture of experts: tau is the same, however its two are stored."""
    runs = []
    for layouts in ((False, False, False), (False, True, False), (True, True, True)):
        folder = tmp_path / "".join("ft"[fused] for fused in layouts)
        model, base, tuned = (
            save_as_on_hub("mixtral", folder / str(seed), seed, fused=fused)
            for seed, fused in enumerate(layouts)
        )
        optimizer = {"name": "onties", "learning_rate": 1e-3, "density": 0.5, "alpha": 0.1}
        optimizer |= {"tau": {"base": base, "tuned": tuned}}
        config = align_config(model, preferences, num_steps=2, optimizer=optimizer)
        runs.append(run_here(config, folder / "run"))
    assert metrics(runs[0])[-1]["tau_cosine"] == metrics(runs[2])[-1]["tau_cosine"] > 0.01
    one, *others = (
        AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in runs
    )
    assert all(torch.equal(one[name], other[name]) for name in one for other in others)


def test_what_is_said_of_mixtures_of_experts(preferences: Path, tmp_path: Path) -> None:
    """Adapters of all linear layers leave out fused experts."""
    model = save_as_on_hub("mixtral", tmp_path / "mixtral")
    assert not list(remarks(align_config(model, preferences, **RUN)))
    (line,) = remarks(align_config(model, preferences, **RUN, lora={"rank": 2}))
    assert line == (
        "lora: all-linear leaves out 4 tensors of experts that are fused "
        "(model.layers.0.mlp.experts.gate_up_proj, ...), which stay as they are"
    )
    assert not list(remarks(align_config(save_as_on_hub("mamba", tmp_path / "m"), preferences)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_two_steps_on_two_workers(strategy: str, preferences: Path, tmp_path: Path) -> None:
    """Every architecture, in turn on the same workers."""
    configs = {}
    for name in ALL if strategy == "fsdp2" else ARCHITECTURES:
        model = save_as_on_hub(name, tmp_path / name / "model")
        config = align_config(model, preferences, **RUN, strategy=strategy, num_workers=2)
        configs[tmp_path / name / "run"] = config
    run_workers_in_turn(configs)
    for run, config in configs.items():
        check_run(config, run, run.parent / "cache")


EXPERTS = {
    "mixtral": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    "deepseek_v2": {"target_parameters": ["gate_up_proj", "down_proj"]},
    "GptOssForCausalLM": {
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj", "down_proj"],
    },
}


def expert_configs(name: str, preferences: Path, folder: Path, **fields: Any) -> list[AlignConfig]:
    """A run of adapters, and one whose only step does not move them."""
    model = save_as_on_hub(name, folder / "model")
    lora = {"rank": 2, "alpha": 6.0, "save": "both"} | EXPERTS[name]
    still = {"num_steps": 1, "optimizer": {"learning_rate": 1e-20}}
    configs = [align_config(model, preferences, **RUN | fields, lora=lora)]
    return [*configs, align_config(model, preferences, **RUN | still, lora=lora)]


def check_adapter(config: AlignConfig, run: Path, start: Path, cache: Path) -> None:
    """The adapter is PEFT's after the steps by hand, and the model is the two merged."""
    base, expected = loaded(config.model), loaded(config.model)
    model = PeftModel.from_pretrained(expected, start / "model" / "adapter", is_trainable=True)
    _, losses = trained_by_hand(config, cache, model)
    assert [line["loss"] for line in metrics(run)] == pytest.approx(losses, rel=1e-5)
    found = PeftModel.from_pretrained(base, run / "model" / "adapter")
    before = load_file(start / "model" / "adapter" / "adapter_model.safetensors")
    wanted = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora_" in k}
    factors = load_file(run / "model" / "adapter" / "adapter_model.safetensors")
    assert wanted.keys() == factors.keys() == before.keys()
    for name, values in wanted.items():
        moved = (values - before[name]).norm()
        assert (values - factors[name]).norm() <= 2e-3 * moved + 1e-6 and moved > 1e-4, name
    merged = found.merge_and_unload().state_dict()
    for name, values in loaded(run / "model").state_dict().items():
        torch.testing.assert_close(values, merged[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mixtral", pytest.param("deepseek_v2", marks=pytest.mark.slow)])
def test_adapters_of_experts(name: str, preferences: Path, tmp_path: Path) -> None:
    config, still = expert_configs(name, preferences, tmp_path)
    runs = [run_here(each, tmp_path / str(n)) for n, each in enumerate((config, still))]
    check_adapter(config, *runs, tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_experts_on_two_workers(preferences: Path, tmp_path: Path) -> None:
    """In shards, with gradient checkpointing."""
    fields = {"strategy": "fsdp2", "num_workers": 2, "gradient_checkpointing": True}
    configs = {
        name: expert_configs(name, preferences, tmp_path / name, **fields) for name in EXPERTS
    }
    run_workers_in_turn({tmp_path / name / "run": one for name, (one, _) in configs.items()})
    for name, (config, still) in configs.items():
        start = run_here(still, tmp_path / name / "start")
        check_adapter(config, tmp_path / name / "run", start, tmp_path / name / "cache")


def test_layers_on_which_no_adapter_acts(preferences: Path, tmp_path: Path) -> None:
    """Mamba's own code takes three layers' weights: left out with a line, and refused by name."""
    model = save_as_on_hub("mamba", tmp_path / "model")
    (line,) = remarks(align_config(model, preferences, lora={"rank": 2}))
    assert line.startswith("lora: all-linear leaves out 6 layers whose weights are taken past an a")
    config = align_config(model, preferences, lora={"target_modules": ["dt_proj"]})
    with pytest.raises(InputError) as caught:
        plan_alignment(config, tmp_path / "cache")
    assert str(caught.value) == (
        "lora.target_modules: backbone.layers.0.mixer.dt_proj: found a layer whose weight "
        "MambaMixer takes by itself, past an adapter; allowed: other layers"
    )


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"target_parameters": ["experts.w1"]},
            "target_parameters: found 'experts.w1', which no tr",
        ),
        (
            {"target_parameters": ["lm_head.weight"]},
            "lm_head.weight: found a weight that is tied to",
        ),
        (
            {"target_modules": ["w1", "w2", "w3"]},
            "found MixtralExperts; allowed: linear layers, or",
        ),
        ({"target_modules": []}, "target_modules: found none, and no target_parameters"),
    ],
)
def test_parameters_that_take_no_adapter(
    lora: dict[str, Any], message: str, preferences: Path, tmp_path: Path
) -> None:
    model = save_as_on_hub("mixtral", tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises((InputError, ValidationError)) as caught:
        plan_alignment(align_config(model, preferences, lora=lora), tmp_path / "cache")
    assert message in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_classes_that_are_refused(name: str, preferences: Path, tmp_path: Path) -> None:
    model = save_as_on_hub(name, tmp_path / "model")
    with pytest.raises(InputError) as caught:
        plan_alignment(align_config(model, preferences, **RUN), tmp_path / "cache")
    line = f"model {model}: found {name}, which cannot be trained: {REFUSED[name]}"
    assert str(caught.value) == line


def test_text_alone_leaves_towers_as_they_are(preferences: Path, tmp_path: Path) -> None:
    """A model of images and text: a remark, and a refusal where all weights would move."""
    model = save_as_on_hub("LlavaForConditionalGeneration", tmp_path / "model")
    config = align_config(model, preferences, **RUN)
    (line,) = remarks(config)
    assert "beside its language model (model.vision_tower." in line and "stay as they are" in line
    assert not list(remarks(align_config(save_as_on_hub("llama", tmp_path / "l"), preferences)))
    zero = align_config(model, preferences, **RUN, strategy="zero2", num_workers=2)
    with pytest.raises(InputError, match="found zero2 with a LlavaForConditionalGeneration, whose"):
        plan_alignment(zero, tmp_path / "cache")
    run = run_here(align_config(model, preferences, **RUN, lora={"rank": 2}), tmp_path / "run")
    before, after = (load_file(path / WEIGHTS) for path in (model, run / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 14 and all("language_model.model.layers." in n for n in changed)


def test_the_table_in_the_docs_says_what_aligns() -> None:
    """With all weights, and with adapters."""
    text = TABLE.read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    told = {name: rest for name, *rest in rows if rest != ["–", "–"]}
    yes, no = ["yes", "yes"], ["no", "no"]
    assert told == dict.fromkeys(ALL, yes) | dict.fromkeys(REFUSED, no)
