"""Texts of messages: lists of names that stay short, and lines that every terminal can show."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

LONGEST_NAME = 60
LONGEST_FILE_NAME = 255
LONGEST_LINE = 4000
SHOWN_NAMES = 12
SHOWN_LINES = 8
SHOWN_DEMOS = 5
PUNCTUATION = "'\"`:;,.()[]{}<>"
BIDIRECTIONAL = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
PLAIN = {
    "→": "->", "←": "<-", "×": "x", "±": "+/-", "…": "...", "–": "-", "—": "-", "−": "-", "‖": "||", "·": "*",
    "≤": "<=", "≥": ">=", "≈": "~", "²": "^2", "’": "'", "‘": "'", "“": '"', "”": '"', "▸": ">", "\xa0": " ",
}  # fmt: skip
"""Signs of our messages → ASCII."""


def shortened(name: object, limit: int = LONGEST_NAME) -> str:
    """Returns a name of at most ``limit`` characters, with … in place of the middle of a longer one.

    >>> shortened("a" * 50 + "b" * 50, limit=9)
    'aaaa…bbbb'
    """
    text = str(name)
    if len(text) <= limit:
        return text
    end = (limit - 1) // 2
    return f"{text[: limit - 1 - end]}…{text[len(text) - end :]}"


def listed(names: Iterable[object], limit: int = SHOWN_NAMES) -> str:
    """Returns the first names, shortened, and the number of the others.

    >>> listed(["a", "b", "c"]), listed(["a", "b", "c", "d"], limit=2)
    ('a, b, c', 'a, b, … (2 more)')
    """
    texts = [str(name) for name in names]
    shown = ", ".join(map(shortened, texts[:limit]))
    return shown + (f", … ({len(texts) - limit} more)" if len(texts) > limit else "")


def module_name(key: str) -> str:
    """Returns an obs key as the name of a torch module, which may not have dots.

    >>> module_name("observation.images.top")
    'observation/images/top'
    """
    return key.replace(".", "/")


def by_name(sentences: Mapping[str, str], noun: str, limit: int = SHOWN_LINES, more: str = "") -> list[str]:
    """Returns lines ``name: sentence``; names with the same sentence share a line, and the last line counts the rest.

    Args:
        sentences: name → its sentence.
        noun: what the names are, such as ``camera``.
        limit: most lines for sentences.
        more: where the rest is found, such as ``--json lists all``.

    >>> by_name({"a": "black", "b": "black", "c": "frozen", "d": "dark"}, "camera", limit=2)
    ['a, b: black', 'c: frozen', '… and 1 more camera']
    """
    names: dict[str, list[str]] = {}
    for name, sentence in sentences.items():
        names.setdefault(sentence, []).append(name)
    lines = [f"{listed(same)}: {sentence}" for sentence, same in names.items()]
    rest = sum(len(same) for same in list(names.values())[limit:])
    return [*lines[:limit], *_count_of_rest(rest, noun, more)]


def few(lines: Sequence[str], noun: str, limit: int = SHOWN_LINES, more: str = "") -> list[str]:
    """Returns the first lines, and a last one that counts the others.

    >>> few(["a", "b", "c", "d"], "warning", limit=2)
    ['a', 'b', '… and 2 more warnings']
    """
    return [*lines[:limit], *_count_of_rest(len(lines) - limit, noun, more)]


def still_sentence(camera: str, state: str, demos: Sequence[str]) -> str:
    """Returns the sentence that reports a camera that is black or frozen during whole demos.

    >>> still_sentence("eye_image", "black", ["demo_1", "demo_4"])
    'camera eye_image is black through 2 whole demos (demo_1, demo_4)'
    """
    count = f"{len(demos)} whole demo{'s' * (len(demos) > 1)}"
    return f"camera {shortened(camera)} is {state} through {count} ({listed(demos, limit=SHOWN_DEMOS)})"


def _count_of_rest(rest: int, noun: str, more: str) -> list[str]:
    return [f"… and {rest} more {noun}{'s' * (rest > 1)}" + (f" ({more})" if more else "")] if rest > 0 else []


def printable(text: str) -> str:
    r"""Escapes what would move a terminal's cursor or change its state: control characters, line ends, lone surrogates.

    >>> printable("a\x1b[2J\nb")
    'a\\x1b[2J\\nb'
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(sign: str) -> str:
    if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or sign in BIDIRECTIONAL:
        return sign.encode("unicode_escape", "surrogatepass").decode()
    return sign


def message_line(text: str) -> str:
    """Returns a message as one line: :func:`printable`, overlong names shortened, and a bounded length."""
    line = re.sub(rf"\S{{{LONGEST_NAME + 1},}}", lambda word: _short_word(word[0]), printable(text))
    return shortened(line, LONGEST_LINE)


def _short_word(word: str) -> str:
    """Shortens a word unless it may be a path: its user may need all of it."""
    path = word.strip(PUNCTUATION)
    parts = path.split("/")
    limit = LONGEST_FILE_NAME if len(parts) > 1 or _exists(path) else LONGEST_NAME
    start = word.index(path)
    short = "/".join(part if len(part) <= limit else shortened(part) for part in parts)
    return word[:start] + short + word[start + len(path) :]


def _exists(path: str) -> bool:
    return len(path) <= LONGEST_FILE_NAME and os.path.lexists(path)


def plain(error: UnicodeError) -> tuple[str, int]:
    """Error handler of codecs: replaces what an output's encoding lacks by ASCII, such as → by ->, or by an escape."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    said = (PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking)
    return "".join(said), error.end
