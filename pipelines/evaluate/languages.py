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


_EAST = {"zh chinese": _CJK, "ko korean": _HANGUL, "ja japanese": _CJK | _KANA}
_LANGUAGES = _EAST | {
    pair: frozenset({script})
    for script, pairs in {"LATIN": _LATIN, **_OTHERS}.items()
    for pair in pairs.split("|")
}
SCRIPTS = {pair.split()[0]: scripts for pair, scripts in _LANGUAGES.items()}  # by code
_CODES = {name: pair.split()[0] for pair in _LANGUAGES for name in pair.split()}

_NEUTRAL = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|(?:https?://|www\.)\S+|\S+@\S+\.\w+", re.DOTALL)
_SYMBOLS = "µΩªº™℃℉Å№"  # units and signs that Unicode counts among letters, or unfolds into them


def code_of(language: str) -> str:
    """The code of two letters of a language, given by it or by its English name.

    Raises:
        InputError: a language that is not in the table.
    """
    name = language.strip().casefold()
    if name not in _CODES:
        near = get_close_matches(name, _CODES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"language: found {language!r}; allowed: such as en, english or zh{hint}")
    return _CODES[name]


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
    scripts = SCRIPTS[code_of(language)]
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
