"""Where attacks take words and characters from. Oracle: files made by hand in the formats of
WordNet (wndb(5)) and nlpaug; a masked model whose weights say which word it likes.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from pipelines.errors import InputError
from pipelines.robustness.attacks import Attack
from pipelines.robustness.config import AttackConfig
from pipelines.robustness.masked_model import MaskedModel, SentenceEncoder, checkpoint_digest
from pipelines.robustness.sources import Table, WordNet, open_source
from pipelines.robustness.template import STOP_WORDS, PromptTemplate

WORDS = "quick fast the brown fox big large dog ##ly quickly".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_wordnet(folder: Path) -> Path:
    """Two nouns and an adjective: `big` with the senses {big, large} and {big, adult, grown_up}."""
    folder.mkdir()
    data = ["00 a 02 big(a) 0 large 1 000 | size", "00 s 03 big 0 grown_up 0 adult 0 000 | age"]
    offsets, text = [], "  1 a licence  \n"
    for line in data:
        offsets.append(len(text))
        text += f"{len(text):08d} {line}  \n"
    (folder / "data.adj").write_text(text)
    places = " ".join(f"{each:08d}" for each in offsets)
    (folder / "index.adj").write_text(f"  1 a licence\nbig a 2 2 & + 2 7 {places}  \n")
    noun = f"{0:08d} 06 n 02 hound 0 dog 0 000 | animal  \n"
    (folder / "data.noun").write_text(noun)
    (folder / "index.noun").write_text(f"dog n 1 0 1 1 {0:08d}  \n")
    for part in ("verb", "adv"):
        (folder / f"data.{part}").write_text("")
        (folder / f"index.{part}").write_text("")
    return folder


def test_synonyms_come_in_wordnets_order(tmp_path: Path) -> None:
    found = open_source(str(save_wordnet(tmp_path / "dict")))
    assert isinstance(found, WordNet)
    assert found.words("big") == ["large", "adult"]  # one word each
    assert found.words("Big") == ["Large", "Adult"] and found.words("DOG") == ["HOUND"]
    assert found.words("cat") == []
    (tmp_path / "dict" / "index.adv").unlink()
    with pytest.raises(InputError, match=r"no index.adv there; allowed: WordNet's folder"):
        open_source(str(tmp_path / "dict"))


def test_tables_of_characters_and_words(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"a": ["q", "s"], "%": "$"}))
    table = open_source(str(file))
    assert isinstance(table, Table) and table.is_of_characters
    config = AttackConfig(attack="deepwordbug", task="t", source=str(file), words=1)
    start = PromptTemplate.parse("aaaa")
    asked = Attack(config, start, []).run(lambda t: 0.0).asked
    assert {t.text for t, _ in asked} <= {"aaa", *_with("q"), *_with("s")}
    assert len(asked) == 3  # equal neighbours are not swapped
    with pytest.raises(InputError, match="found a table of characters; allowed with substitution"):
        Attack(AttackConfig(attack="substitution", task="t", source=str(file)), start, [])
    words = tmp_path / "spelling.txt"
    words.write_text("Because becouse becuase\nalone\n\n")
    assert open_source(str(words)).words("because") == ["becouse", "becuase"]
    with pytest.raises(InputError, match="found a table of words; allowed with deepwordbug"):
        Attack(config.model_copy(update={"source": str(words)}), start, [])


def _with(other: str) -> set[str]:
    """`aaaa` with a letter replaced or put in before one."""
    replaced = {"a" * n + other + "a" * (3 - n) for n in range(4)}
    return replaced | {"a" * n + other + "a" * (4 - n) for n in range(4)}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "none.json",
            None,
            "No such file or directory; allowed: a file, a folder, nlpaug",
        ),
        ("bad.json", "[", "bad.json: not JSON"),
        ("list.json", "[]", "list.json: allowed: lists of texts by character or by word"),
        ("number.json", '{"a": 1}', "'a': found 1; allowed: a list of texts"),
        ("empty.txt", "alone\n", "empty.txt: holds no line of a word and others"),
    ],
)
def test_bad_sources(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path / name))


def test_a_package_is_read_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="the package nlpaug is not installed"):
        open_source("nlpaug:ocr")
    folder = tmp_path / "nlpaug"
    (folder / "res/char/ocr").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError\n")
    (folder / "res/char/ocr/en.json").write_text('{"o": ["0"]}')
    monkeypatch.syspath_prepend(tmp_path)
    assert open_source("nlpaug:ocr").words("o") == ["0"]


def save_bert(kind: type, folder: Path, also: Sequence[str] = (), **likes: float) -> Path:
    """A random BERT; a masked one has a bias for some words."""
    tokens = [*SPECIAL, *WORDS, *"abcdefgh.,:", *also]
    vocabulary = {word: n for n, word in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": text for name, text in names.items()}
    )
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = BertConfig(
        vocab_size=len(fast), num_attention_heads=2, max_position_embeddings=16, **sizes
    )
    model = kind(config)
    for word, value in likes.items():
        model.cls.predictions.bias.data[vocabulary[word]] = value
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_the_likeliest_whole_words_come_first(tmp_path: Path) -> None:
    likes = {"the": 90.0, "##ly": 80.0, "fast": 70.0, "quick": 60.0, "big": 50.0}
    folder = save_bert(BertForMaskedLM, tmp_path / "m", **likes)
    model = MaskedModel(folder)
    assert model.words("the ", "quick", " fox", 2, mask=False) == ["fast", "big"]
    assert model.words("the ", "Dog", " fox", 2, mask=True) == ["Fast", "Quick"]
    far = "fox " * 30
    assert model.words(far, "quick", far, 1, mask=False) == ["fast"]
    config = AttackConfig(attack="bertattack", task="t", model=folder, words=1)
    found = Attack(config, PromptTemplate.parse("the dog {{ a }}"), []).run(
        lambda t: -float("quick" in t.text)
    )
    assert found.template.text == "the quick {{ a }}"
    assert [t.text for t, _ in found.asked] == ["the fast {{ a }}", "the quick {{ a }}"]


def test_the_model_reads_the_word_or_a_mask_in_its_place(tmp_path: Path) -> None:
    folder = save_bert(BertForMaskedLM, tmp_path / "m")
    plain = BertForMaskedLM.from_pretrained(folder).eval()
    model = MaskedModel(folder)
    tokenizer = model._tokenizer
    for mask, middle in ((False, "quick"), (True, "[MASK]")):
        inputs = tokenizer(f"the {middle} brown fox", return_tensors="pt")
        logits = plain(inputs["input_ids"]).logits[0, 1]
        words = tokenizer.convert_ids_to_tokens(logits.argsort(descending=True).tolist())
        whole = [w for w in words if w in WORDS and w not in ("the", "##ly", "quick")]
        assert model.words("the ", "quick", " brown fox", 3, mask=mask) == whole[:3]


ENDINGS = ("##er", "##ing", "##s", "##x1", "##e", "##y", "th")


@pytest.mark.parametrize("word", ["foxly", "doging", "Bigger"])
def test_words_of_several_tokens_are_ranked_by_the_product(tmp_path: Path, word: str) -> None:
    """Against all combinations in float64: a beginning and as many other pieces as the word has."""
    folder = save_bert(BertForMaskedLM, tmp_path / "m", (*ENDINGS, "##g", "##ers"))
    plain = BertForMaskedLM.from_pretrained(folder).eval()
    model = MaskedModel(folder)
    tokenizer = model._tokenizer
    own = tokenizer.tokenize(word)
    assert len(own) >= 2
    ids = tokenizer(f"the {word} fox", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = plain(ids).logits[0, 1 : 1 + len(own)].double().log_softmax(-1)
    names = tokenizer.get_vocab()
    first = [each for each in names if each.isalpha()]
    inner = [each for each in names if each.startswith("##") and each[2:].isalpha()]
    scored = sorted(
        (
            -sum(float(logits[n, names[piece]]) for n, piece in enumerate(pieces)),
            "".join(piece.removeprefix("##") for piece in pieces),
        )
        for pieces in itertools.product(first, *[inner] * (len(own) - 1))
    )
    expected = [text for _, text in scored if text != word.lower() and text not in STOP_WORDS]
    expected = list(dict.fromkeys(expected))[:9]
    found = model.words("the ", word, " fox", 9, mask=False)
    assert [each.lower() for each in found] == expected
    assert all(each[0].isupper() == word[0].isupper() for each in found)


def test_an_encoder_averages_vectors(tmp_path: Path) -> None:
    folder = save_bert(BertModel, tmp_path / "e")
    encoder = SentenceEncoder(folder)
    model = BertModel.from_pretrained(folder).eval()
    texts = ["the big dog", "quick fox"]
    with torch.inference_mode():
        one, other = (
            model(encoder._tokenizer(text, return_tensors="pt")["input_ids"])
            .last_hidden_state[0]
            .double()
            .mean(0)
            for text in texts
        )
    expected = float(one @ other / one.norm() / other.norm())
    assert encoder.cosine(*texts) == pytest.approx(expected, abs=1e-5)
    fields = {"task": "t", "source": str(_words(tmp_path)), "encoder": folder, "words": 1}
    start = PromptTemplate.parse("big dog")
    for least, count in ((expected - 5, 1), (1.0, 0)):
        config = AttackConfig(
            attack="substitution", protect=["dog"], min_cosine=max(least, -0.99), **fields
        )
        ready = Attack(config, start, [])
        if count:
            assert len(ready.run(lambda t: 0.0).asked) == count
        else:
            with pytest.raises(InputError, match="no other word was found for: big"):
                ready.run(lambda t: 0.0)


def _words(folder: Path) -> Path:
    file = folder / "words.txt"
    file.write_text("big quick\n")
    return file


def test_checkpoints_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model: .*: no Hugging Face checkpoint there"):
        checkpoint_digest("model", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="no safetensors there; others are not read"):
        checkpoint_digest("model", tmp_path)
