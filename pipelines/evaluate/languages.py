"""Which language a text is in, by the scripts of its letters; one answer in two is code-switching.

Scripts tell languages of different scripts apart. Languages of one script, such as English and
German, differ only where the task gives a list of words.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches

from pipelines.errors import InputError

# Unicode names of letters begin with their script.
_CJK, _HANGUL = frozenset({"CJK", "IDEOGRAPHIC"}), frozenset({"HANGUL"})
_KANA = frozenset({"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"})
_LATIN = (
    "af afrikaans|sq albanian|eu basque|ca catalan|hr croatian|cs czech|da danish|nl dutch|"
    "en english|et estonian|fi finnish|fr french|de german|hu hungarian|is icelandic|"
    "id indonesian|ga irish|it italian|lv latvian|lt lithuanian|ms malay|no norwegian|pl polish|"
    "pt portuguese|ro romanian|sk slovak|sl slovenian|es spanish|sw swahili|sv swedish|"
    "tl tagalog|tr turkish|vi vietnamese|cy welsh"
)
_OTHERS = {
    "ARABIC": "ar arabic|fa persian|ur urdu",
    "ARMENIAN": "hy armenian",
    "BENGALI": "bn bengali",
    "CYRILLIC": "be belarusian|bg bulgarian|mk macedonian|ru russian|uk ukrainian",
    "DEVANAGARI": "hi hindi|mr marathi|ne nepali",
    "ETHIOPIC": "am amharic",
    "GEORGIAN": "ka georgian",
    "GREEK": "el greek",
    "GUJARATI": "gu gujarati",
    "HEBREW": "he hebrew",
    "KHMER": "km khmer",
    "LAO": "lo lao",
    "MYANMAR": "my burmese",
    "TAMIL": "ta tamil",
    "TELUGU": "te telugu",
    "THAI": "th thai",
}


def _scripts() -> dict[str, frozenset[str]]:
    table = {"zh": _CJK, "chinese": _CJK, "ko": _HANGUL, "korean": _HANGUL}
    table |= dict.fromkeys(("ja", "japanese"), _CJK | _KANA)
    for script, names in {"LATIN": _LATIN, **_OTHERS}.items():
        table |= dict.fromkeys(re.split(r"[ |]", names), frozenset({script}))
    return table


SCRIPTS = _scripts()  # a language's code and its English name -> the scripts that it is written in

_NEUTRAL = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|(?:https?://|www\.)\S+|\S+@\S+\.\w+", re.DOTALL)
_SYMBOLS = "µΩªº™℃℉Å№"  # units and signs that Unicode counts among letters, or unfolds into them


def scripts_of(language: str) -> frozenset[str]:
    """The scripts of a language, given by its code of two letters or its English name.

    Raises:
        InputError: a language that is not in the table.
    """
    name = language.strip().casefold()
    if name not in SCRIPTS:
        near = get_close_matches(name, SCRIPTS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"language: found {language!r}; allowed: such as en, english or zh{hint}")
    return SCRIPTS[name]


def words_of(text: str) -> Iterator[str]:
    """Runs of letters of one script, with their marks and with a language's own apostrophes."""
    text = unicodedata.normalize("NFKC", re.sub(f"[{_SYMBOLS}]", " ", text)).casefold()
    word, script = "", ""
    for letter in text:
        category = unicodedata.category(letter)[0]
        own = _script(letter) if category == "L" else ""
        if own and (not word or own == script):
            word, script = word + letter, own
        elif category == "M" and word:
            word += letter
        else:
            if word:
                yield word
            word, script = (letter, own) if own else ("", "")
    if word:
        yield word


def _script(letter: str) -> str:
    """The script of a letter; none of one that goes with all, such as a modifier."""
    script = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
    return "" if script == "MODIFIER" else script


def is_in_language(
    text: str,
    language: str,
    copied: Iterable[str] = (),
    known: Collection[str] | None = None,
) -> bool:
    """Whether every word of a text is of one language, and there is one.

    Digits, punctuation, symbols, code, addresses, single Latin and Greek letters (as in formulas)
    and words of `copied` may stand in any text.

    Args:
        language: its code or English name.
        copied: texts such as the question, whose words may be repeated.
        known: all words of the language; none: any word of its scripts is taken for its word.

    Raises:
        InputError: an unknown language.
    """
    scripts = scripts_of(language)
    repeated = {word for each in copied for word in words_of(each)}
    listed = None if known is None else {part for word in known for part in words_of(word)}
    found = False
    for word in words_of(_NEUTRAL.sub(" ", text)):
        script = _script(word[0])
        if script in scripts and (listed is None or word in listed):
            found = True
        elif not (word in repeated or (len(word) == 1 and script in ("LATIN", "GREEK"))):
            return False
    return found
