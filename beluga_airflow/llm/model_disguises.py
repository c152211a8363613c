"""How a demand may be hidden in data from whoever reads only what is in the open; each disguise is taken off here."""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
import unicodedata
from collections.abc import Callable, Iterator
from urllib.parse import unquote

Disguise = Callable[[str], Iterator[str]]

_WORDS = re.compile(r"answer|ignore|respond|reply|output|decision|choose|select", re.IGNORECASE)
_TAGS = range(0xE0000, 0xE0080)
_LOOK_ALIKES = str.maketrans(
    "аеорсухіјѕԁһԛԝІАВЕКМНОРСТХαοενικτυΑΒΕΗΙΚΜΝΟΡΤΧΥ", "aeopcyxijsdhqwIABEKMHOPCTXaoevikruABEHIKMNOPTXY"
)
_LEET = str.maketrans("4310577@$", "aeiosttas")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{12,}={0,2}")
_HEXADECIMAL = re.compile(r"(?:(?:0x)?[0-9a-fA-F]{2}[\s:,]*){8,}")
_ESCAPE = re.compile(r"\\(?:u\{?([0-9a-fA-F]{4,6})\}?|x([0-9a-fA-F]{2}))")
_LETTERS_APART = re.compile(r"(?<!\w)\w(?:[ .*_-]\w){3,}(?!\w)")
_BETWEEN_LETTERS = re.compile(r"[ .*_-]")


def _bare(text: str) -> str:
    """Without signs that cannot be seen, and with those that only look like letters as the letters."""
    tagged = "".join(chr(ord(char) - _TAGS.start) if ord(char) in _TAGS else char for char in text)
    seen = (char for char in unicodedata.normalize("NFKC", tagged) if unicodedata.category(char) != "Cf")
    return "".join(seen)


def _unseen(text: str) -> Iterator[str]:
    yield _bare(text)


def _look_alikes(text: str) -> Iterator[str]:
    apart = unicodedata.normalize("NFD", _bare(text).translate(_LOOK_ALIKES))
    yield "".join(char for char in apart if not unicodedata.combining(char))


def _letters_apart(text: str) -> Iterator[str]:
    # words stand further apart than their letters
    yield re.sub(r"\s{2,}", " ", _LETTERS_APART.sub(lambda found: _BETWEEN_LETTERS.sub("", found[0]), text))


def _escapes(text: str) -> Iterator[str]:
    def char(found: re.Match[str]) -> str:
        number = int(found[1] or found[2], 16)
        return chr(number) if number < 0x110000 else found[0]

    yield _ESCAPE.sub(char, unquote(html.unescape(text)))


def _base64(text: str) -> Iterator[str]:
    for found in _BASE64.finditer(text):
        code = found[0].rstrip("=").replace("-", "+").replace("_", "/")
        yield from _decoded(lambda code=code: base64.b64decode(code + "=" * (-len(code) % 4)))  # type: ignore[misc]  # mypy knows no defaults of lambdas


def _hexadecimal(text: str) -> Iterator[str]:
    for found in _HEXADECIMAL.finditer(text):
        yield from _decoded(lambda found=found: bytes.fromhex(re.sub(r"0x|[\s:,]", "", found[0])))  # type: ignore[misc]  # as above


def _decoded(decode: Callable[[], bytes]) -> Iterator[str]:
    try:
        yield decode().decode()
    except (binascii.Error, ValueError):
        return


def _meaningful(change: Callable[[str], str]) -> Disguise:
    """A change that makes noise of what is not disguised so: it counts where it makes words."""

    def views(text: str) -> Iterator[str]:
        changed = change(text)
        if _WORDS.search(changed) and not _WORDS.search(text):
            yield changed

    return views


DISGUISES: tuple[Disguise, ...] = (
    _unseen,
    _look_alikes,
    _letters_apart,
    _escapes,
    _base64,
    _hexadecimal,
    _meaningful(lambda text: codecs.encode(text, "rot13")),
    _meaningful(lambda text: text[::-1]),
    _meaningful(lambda text: text.translate(_LEET)),
)
