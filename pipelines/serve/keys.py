"""API keys: who may ask. Only their digests are kept, and nothing of them is written anywhere.

A file has a key a line, or a name and a key; the name stands in the log. Lines that begin with #
are comments. The file is read again when it has changed.
"""

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import InputError

VARIABLE = "POISE_API_KEYS"
DEPLOY_VARIABLE = "POISE_DEPLOY_KEYS"
SHORTEST = 16
Digests = dict[str, bytes]  # name -> SHA-256 of the key


class Keys:
    """The keys of a server.

    Args:
        file: which is read again when it changes; while it is missing or wrong, none of its keys
            is good.
        fixed: further keys.
    """

    def __init__(self, file: Path | None, fixed: Mapping[str, bytes]) -> None:
        self._file, self._fixed = file, dict(fixed)
        self._stamp: tuple[int, int, int] | None = None
        self._read: Digests = {}

    @property
    def is_open(self) -> bool:
        """Whether everybody may ask, as there are no keys at all."""
        return self._file is None and not self._fixed

    def owner(self, authorization: str | None) -> str | None:
        """The name of the key in a request's header `Authorization: Bearer KEY`; None where it is
        none of ours. All keys are compared, each in constant time.
        """
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            return None
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = None
        for name, known in (self._fixed | self._from_file()).items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _from_file(self) -> Digests:
        """The keys in the file, as it is now."""
        if self._file is None:
            return {}
        try:
            found = self._file.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp != self._stamp:
                self._read = read_keys(self._file.read_text(), str(self._file))
                self._stamp = stamp
        except (OSError, ValueError):
            self._read, self._stamp = {}, None
        return self._read


def read_keys(text: str, place: str) -> Digests:
    """The digests of the keys in a text, by their names.

    Raises:
        InputError: a line that is no key; it is named by its number alone.
    """
    found: Digests = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name = words[0] if len(words) == 2 else f"key-{number}"
        if len(words) > 2 or len(words[-1]) < SHORTEST:
            raise InputError(
                f"{place} line {number}: allowed: KEY or NAME KEY, with a key of {SHORTEST} or "
                "more characters"
            )
        if name in found:
            raise InputError(f"{place} line {number}: the name {name} is taken; allowed: another")
        found[name] = hashlib.sha256(words[-1].encode()).digest()
    return found


def keys_in_environment(variable: str = VARIABLE) -> Digests:
    """The keys in an environment variable, with commas between them."""
    text = os.environ.get(variable, "").replace(",", "\n")
    return {f"{variable}-{name}": key for name, key in read_keys(text, variable).items()}


def check_file(file: str | None, field: str = "keys_file") -> None:
    """Raise InputError where a file of keys cannot be used."""
    if file is None:
        return
    try:
        found = read_keys(Path(file).read_text(), file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError(f"{field}: {file}: cannot be read: {reason}") from None
    if not found:
        raise InputError(f"{field}: {file}: holds no key; allowed: at least one")
