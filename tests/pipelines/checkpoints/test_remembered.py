"""What is remembered of transformers' answers between commands.

Oracle: the answers without a memory; and for a merge, its bytes.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from transformers import AutoConfig

from pipelines.checkpoints import TensorSpec, architecture, remembered
from pipelines.checkpoints.architecture import Architecture, architecture_of
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge, plan_merge
from tests.model_kinds import DECODER, T5
from tests.pipelines.merge.conftest import make_family, save_weights, set_config, weights_of

ASKER = Path(architecture.__file__)
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", DECODER | {"tie_word_embeddings": True}),
    "GPT2LMHeadModel": ("gpt2", GPT2),  # Conv1D, masks, names without a prefix
    "T5ForConditionalGeneration": ("t5", T5),  # three names of one embedding
    "MixtralForCausalLM": ("mixtral", DECODER | {"num_local_experts": 2}),  # fused tensors
}


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an empty memory."""
    monkeypatch.setenv(remembered.VARIABLE, str(tmp_path / "cache"))
    architecture._architecture.cache_clear()
    yield tmp_path / "cache" / "architectures"
    architecture._architecture.cache_clear()


class Oracle:
    """Answers, and counts how often it is asked."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.count = answer, 0

    def __call__(self) -> Any:
        self.count += 1
        return self.answer


def ask(oracle: Oracle, question: Any = "q", asker: Path = ASKER) -> Any:
    return remembered.remembered(asker, question, oracle)


def test_an_answer_is_asked_for_once(memory: Path, tmp_path: Path) -> None:
    oracle = Oracle({"a": (1, 2.5, None)})
    assert [ask(oracle) for _ in range(3)] == [{"a": [1, 2.5, None]}] * 3
    assert oracle.count == len(list(memory.iterdir())) == 1
    for number, question in enumerate(("other", ["q"], {"q": 1}, {"q": 1.5}), start=2):
        ask(oracle, question)
        assert oracle.count == number
    own = tmp_path / "asker.py"
    for number, code in enumerate(("one", "two", "one"), start=6):
        own.write_text(code)
        ask(oracle, asker=own)
        assert oracle.count == min(number, 7)  # of the same code it is known again


def test_an_error_is_not_kept(memory: Path) -> None:
    def fails() -> None:
        raise OSError("not installed")

    with pytest.raises(OSError, match="not installed"):
        remembered.remembered(ASKER, "q", fails)
    assert ask(Oracle("now it is")) == "now it is"


def test_damaged_files_are_asked_for_again(memory: Path) -> None:
    ask(Oracle("right"))
    [file] = memory.iterdir()
    whole = file.read_bytes()
    damaged = [whole[:end] for end in range(len(whole))]
    damaged += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for content in (*damaged, b"\xff" + whole, bytes(len(whole))):
        file.write_bytes(content)
        oracle = Oracle("right")
        assert ask(oracle) == "right"
        assert oracle.count == 1
        assert file.read_bytes() == whole
    ask(Oracle("other"), "other")
    [other] = set(memory.iterdir()) - {file}
    other.replace(file)  # an answer to another question
    assert ask(Oracle("right")) == "right"


def test_without_a_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in ("", str(tmp_path / "file"), "/proc/nowhere"):
        monkeypatch.setenv(remembered.VARIABLE, place)
        oracle = Oracle("right")
        assert ask(oracle) == ask(oracle) == "right"
        assert oracle.count == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(remembered.VARIABLE)
    ask(Oracle("right"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    ask(Oracle("right"))
    for folder in (".cache", "xdg"):
        assert len(list((tmp_path / folder / "poise" / "architectures").iterdir())) == 1


def test_other_packages_are_asked_again(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = remembered._packages.__wrapped__
    before = packages()
    assert before == packages() is not None
    own = Path(setuptools.__file__).parent / "_vendor"
    assert any(own.glob("*.dist-info"))
    monkeypatch.syspath_prepend(str(own))  # as importing setuptools does
    assert packages() == before
    monkeypatch.setattr(remembered, "_packages", packages)
    oracle = Oracle("right")
    ask(oracle)
    (tmp_path / "new-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packages() != before
    assert ask(oracle) == ask(oracle) == "right"
    assert oracle.count == 2
    # A working copy of transformers has other code from one moment to the next.
    working_copy = SimpleNamespace(origin=str(tmp_path / "transformers" / "__init__.py"))
    monkeypatch.setattr(remembered, "find_spec", lambda name: working_copy)
    assert ask(oracle) == ask(oracle) == "right"
    assert oracle.count == 4


def test_the_oldest_answers_go(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST_FILES", 4)
    for question in range(5):
        ask(Oracle("right"), question)
    assert len(list(memory.iterdir())) == 3
    oracle = Oracle("right")
    ask(oracle, 4)
    ask(oracle, 0)
    assert oracle.count == 1


def answers(config: dict[str, Any]) -> dict[str, Any]:
    """All that can be asked of a config's class, by a process that starts."""
    architecture._architecture.cache_clear()
    known = architecture_of(config)
    assert known is not None
    names = ["transformer.wte.weight", "wte.weight", "h.0.attn.bias", "shared.weight", "nonsense"]
    names += ["lm_head.weight", "model.embed_tokens.weight", "decoder.embed_tokens.weight"]
    names += ["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    tensors = {name: TensorSpec(name, torch.float32, (64, 32), Path()) for name in names}
    return {
        "name": known.name,
        "tied": known.tied_groups,
        "conv": known.conv1d_weights,
        "tokens": known.token_dimensions,
        "names": known.names_in_model(names),
        "unneeded": known.unneeded(names),
        "loading": known.try_loading(tensors),
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_classes_say(name: str, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, fields = ARCHITECTURES[name]
    config = AutoConfig.for_model(kind, **fields).to_dict() | {"architectures": [name]}
    with monkeypatch.context() as patch:
        patch.setenv(remembered.VARIABLE, "")
        expected = answers(config)
    assert expected["names"] and expected["tokens"] and expected["loading"].unexpected
    assert answers(config) == expected
    with monkeypatch.context() as patch:
        patch.setattr(architecture, "_build", None)
        assert answers(config) == expected
        with pytest.raises(TypeError):  # what was not asked yet needs the model
            Architecture(config).names_in_model(["other"])


def test_a_process_builds_a_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges that differ in nothing but weights, without a memory on the disk."""
    monkeypatch.setenv(remembered.VARIABLE, "")
    family = make_family(tmp_path)
    set_config(family.base, rope_theta=12345.0)  # a config that no other test has
    build, built = architecture._build, []
    monkeypatch.setattr(architecture, "_build", lambda config: built.append(0) or build(config))
    for weight in (0.1, 0.2):
        parameters = {"parameters": {"weight": weight, "density": 0.5}}
        plan_merge(MergeConfig.model_validate(family.config("ties", **parameters)))
        if weight == 0.1:
            count = len(built)
    assert len(built) == count > 0


RUN = """
import sys
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge
right, wrong, out = sys.argv[1:]
merge(MergeConfig.model_validate_json(right), out)
try:
    merge(MergeConfig.model_validate_json(wrong), out + "-wrong")
except InputError as error:
    print(error)
print("transformers" in sys.modules)
"""


def test_a_second_merge_needs_no_transformers(memory: Path, tmp_path: Path) -> None:
    """And what is refused is refused with the same words."""
    family = make_family(tmp_path / "models", torch.bfloat16)
    right = MergeConfig.model_validate(family.config("linear", parameters={"weight": 0.5}))
    first = Path(merge(right, tmp_path / "first"))
    wrong = {"merge_method": "passthrough", "models": [{"model": str(family.base)}]}
    tensors = weights_of(family.base)
    del tensors["model.norm.weight"]
    save_weights(family.base, tensors)
    with pytest.raises(InputError) as refused:
        merge(MergeConfig.model_validate(wrong), tmp_path / "wrong")
    assert "needs model.norm.weight" in str(refused.value)
    arguments = [right.model_dump_json(exclude_unset=True), json.dumps(wrong)]
    command = [sys.executable, "-c", RUN, *arguments, str(tmp_path / "second")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [str(refused.value), "False"]
    for file in first.iterdir():
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes()
