"""Numbers of tokens in the output's settings mean the tokens that they meant.

Oracle: the text of each number, as the output's own tokenizer says it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge, plan_merge
from tests.pipelines.merge.conftest import set_config

WORDS = [f"w{i}" for i in range(20)]
BASE = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
CHAT = ["<unk>", "<pad>", "<image>", "<bos>", "<im_end>", "<eos>"]


def save(folder: Path, special: list[str], seed: int, **ids: Any) -> Path:
    """A tiny Llama whose words have the numbers of a list."""
    names = [*special, *WORDS]
    raw = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    FastTokenizer(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>").save_pretrained(
        folder
    )
    torch.manual_seed(seed)
    numbers = {f"{n}_token_id": names.index(f"<{n}>") for n in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(names), num_hidden_layers=1, **sizes, **(numbers | ids))
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def set_generation(folder: Path, **fields: Any) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a chat model that ends texts with either of two tokens."""
    base = save(tmp_path / "base", BASE, 0)
    chat = save(tmp_path / "chat", CHAT, 1, eos_token_id=[4, 5])
    return base, chat


def config_of(pair: tuple[Path, ...], tokenizer: object, **fields: object) -> MergeConfig:
    entries = [{"model": str(path)} for path in pair]
    given = {"merge_method": "linear", "base_model": str(pair[0]), "models": entries}
    return MergeConfig.model_validate(given | {"tokenizer_source": tokenizer} | fields)


def settings_of(out: Path | str, name: str = "config.json") -> dict[str, Any]:
    return json.loads((Path(out) / name).read_text())


def test_another_models_tokenizer(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """config.json's tokens get their new numbers; generation_config.json is the chat model's."""
    chat = pair[1]
    out = Path(merge(config_of(pair, str(chat)), tmp_path / "out"))
    found = settings_of(out)
    ids = {key: value for key, value in found.items() if key.endswith("_token_id")}
    assert ids == {"bos_token_id": 3, "eos_token_id": 5, "pad_token_id": 1}
    generation = (chat / "generation_config.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == generation
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [4, 5]


def test_a_list_of_ends_stays_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The chat model gives the config, and its <im_end> is no token of the base's tokenizer."""
    base, chat = pair
    config = config_of((chat, base), str(base))
    out = merge(config, tmp_path / "out")
    assert settings_of(out)["eos_token_id"] == [2]
    [_, notice] = plan_merge(config).notices()
    assert notice == (
        "config.json: eos_token_id: 4 is '<im_end>', which the written tokenizer does not have; "
        "the output does without it"
    )
    set_config(chat, eos_token_id=4)
    with pytest.raises(InputError) as caught:
        merge(config, tmp_path / "other")
    assert str(caught.value).startswith(
        "config.json: eos_token_id: found 4, '<im_end>', which the written tokenizer does not have;"
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("tokenizer", ["union", "base", None])
def test_the_configs_own_tokenizer_changes_nothing(
    pair: tuple[Path, Path], tmp_path: Path, tokenizer: str | None
) -> None:
    base = pair[0]
    models = pair if tokenizer else (base, save(tmp_path / "more", BASE, 2))
    out = Path(merge(config_of(models, tokenizer), tmp_path / "out"))
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert settings_of(out)[name] == settings_of(base)[name]
    name = "generation_config.json"
    assert (out / name).read_bytes() == (base / name).read_bytes()


NESTED = {
    "text_config": {"vocab_size": 25, "eos_token_id": [2], "pad_token_id": 0},
    "audio_config": {"vocab_size": 7, "eos_token_id": 2},  # of sounds
    "vision_config": {"patch_size": 2},
    "image_token_id": 4,
    "video_token_index": 4,
    "decoder_start_token_id": 1,
    "forced_bos_token_id": 1,
    "suppress_tokens": [0, 3],
    "bad_words_ids": [[2, 3], [5]],
    "forced_decoder_ids": [[1, 2], [2, 4]],
    "sequence_bias": [[[2, 4], 0.5]],
    "lang_to_id": {"<|en|>": 4},
    "mask_token_id": None,
    "sep_token_id": -1,
    "num_token_kinds": 4,
}


def test_every_field_that_means_tokens(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, chat = pair
    set_config(base, **NESTED, architectures=["OwnForCausalLM"])
    set_generation(base, **{k: v for k, v in NESTED.items() if "config" not in k})
    (chat / "generation_config.json").unlink()
    out = merge(config_of(pair, str(chat)), tmp_path / "out")
    expected = {
        "image_token_id": 2,
        "video_token_index": 2,
        "decoder_start_token_id": 3,
        "forced_bos_token_id": 3,
        "suppress_tokens": [1, 0],
        "bad_words_ids": [[5, 0], [6]],
        "forced_decoder_ids": [[1, 5], [2, 2]],
        "sequence_bias": [[[5, 2], 0.5]],
        "lang_to_id": {"<|en|>": 2},
        "mask_token_id": None,
        "sep_token_id": -1,
        "num_token_kinds": 4,
    }
    config, generation = settings_of(out), settings_of(out, "generation_config.json")
    assert {key: config[key] for key in expected} == expected
    assert {key: generation[key] for key in expected} == expected
    assert generation["eos_token_id"] == 5
    assert config["text_config"]["eos_token_id"] == [5]
    assert config["text_config"]["pad_token_id"] == 1
    assert config["audio_config"] == NESTED["audio_config"]


def test_tokens_that_the_written_tokenizer_lacks(tmp_path: Path) -> None:
    """A field that may be null is; another one gets a number that no token has."""
    base = save(tmp_path / "base", BASE, 0)
    plain = save(tmp_path / "plain", ["<unk>", "<eos>", "<bos>", "<pad>"], 1)
    ids = {"image_token_id": 4, "mask_token_id": 4, "suppress_tokens": [4, 3], "pad_token_id": 99}
    set_config(base, **ids, bad_words_ids=[[5, 4], [2]])
    config = config_of((base, plain), str(plain))
    found = settings_of(merge(config, tmp_path / "out"))
    assert {key: found[key] for key in ids} == {
        "image_token_id": -1,
        "mask_token_id": None,
        "suppress_tokens": [0],
        "pad_token_id": None,
    }
    assert found["bad_words_ids"] == [[1]]
    notices = plan_merge(config).notices()[1:]
    assert sorted(notices) == sorted(
        f"config.json: {place} is {token}, which the written tokenizer does not have; the output "
        "does without it"
        for place, token in {
            "image_token_id: 4": "'<image>'",
            "mask_token_id: 4": "'<image>'",
            "suppress_tokens: 4": "'<image>'",
            "bad_words_ids: 4": "'<image>'",
            "pad_token_id: 99": "no token",
        }.items()
    )


def test_a_named_merge_hands_its_numbers_on(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """In a chain, the numbers that count are those of the merge before."""
    base, chat = pair
    inner = config_of(pair, str(chat)).model_dump(exclude_defaults=True)
    last = {"merge_method": "linear", "models": [{"model": "inner"}], "merges": {"inner": inner}}
    out = Path(merge(MergeConfig.model_validate(last), tmp_path / "out"))
    assert [settings_of(out)[f"{n}_token_id"] for n in ("bos", "eos", "pad")] == [3, 5, 1]
    again = last | {"tokenizer": str(base), "models": [{"model": "inner"}, {"model": str(base)}]}
    out = Path(merge(MergeConfig.model_validate(again), tmp_path / "again"))
    assert [settings_of(out)[f"{n}_token_id"] for n in ("bos", "eos", "pad")] == [1, 2, 0]
