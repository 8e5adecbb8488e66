"""What an answer was asked to be, and whether it is: constraints that code can verify, without a judge.

A prompt's `checks` is an object with a kind of constraint and what is wanted of it in each entry:

    {"words": {"at_most": 50}, "contains": ["sea", "salt"], "stops": true}

Texts are compared without case, but for `case` itself. Everything is counted in the answer as it was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

_BOUNDS = ("at_least", "at_most", "exactly")
_BULLET = re.compile(r"^\s*(?:[-*•+]|\(?\d{1,3}[.)])\s+\S", re.MULTILINE)
_FENCE = re.compile(r"^```[a-zA-Z]*\s*\n(.*)\n```$", re.DOTALL)
_CJK_END = "\u3002\uff01\uff1f"
"""The full stop and the marks of languages that put no blank behind them."""
_SENTENCE_END = re.compile(rf"[.!?…{_CJK_END}]+[\"'”\u2019»)\]]*(?=\s|$)|[{_CJK_END}]")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|approx|Mr|Mrs|Ms|Dr|Prof|St|No|Fig)|\b[A-Z])\.$", re.IGNORECASE
)
_LIST_NUMBER = re.compile(r"(?m)^\s*\(?\d{1,3}[.)]$")
_COMMON_WORDS = {
    "English": "the and of to is in that it you for with are this have was not be on as at by",
    "German": "der die das und ist nicht ein eine ich du sie es mit auf für den dem von zu auch wie im",
    "French": "le la les des et est une un dans que qui pour avec pas sur vous je il elle au du sont",
    "Spanish": "el la los las de que y en un una es por con para no se del al su lo como más",
    "Italian": "il lo la gli le di che e un una è per con non si del della sono nel più come al",
    "Portuguese": "o a os as de que e um uma é por com para não se do da em no na são mais",
    "Dutch": "de het een en van ik je niet is dat op te voor met zijn er ook als aan door om",
}
"""Words that a text of some length in a language cannot do without."""
_SCRIPTS = {
    "Russian": "\u0400-\u04ff",
    "Greek": "\u0370-\u03ff",
    "Arabic": "\u0600-\u06ff",
    "Hindi": "\u0900-\u097f",
    "Chinese": "\u4e00-\u9fff",
    "Japanese": "\u3040-\u30ff",
    "Korean": "\uac00-\ud7af",
}
"""Letters that tell a language by themselves; Chinese has none of Japan's beside them."""
LANGUAGES = (*_COMMON_WORDS, *_SCRIPTS)


class Check(NamedTuple):
    """One constraint of a prompt.

    Args:
        kind: Which, as a file names it.
        wanted: What is wanted, as a file says it.
    """

    kind: str
    wanted: Any

    def holds(self, answer: str, stopped: bool | None = None) -> bool:
        """Returns whether an answer is as it was asked to be.

        Args:
            answer: The whole of it.
            stopped: Whether the model ended it; None where that is not known, which is counted as stopped.
        """
        if self.kind == "stops":
            return stopped is not False
        return _KINDS[self.kind].holds(answer.strip(), self.wanted)


def read_checks(value: Any) -> tuple[Check, ...]:
    """Returns the constraints that an object of a file names.

    Raises:
        ValueError: It is none, or one of them is not to be understood; says which, and what it may be.
    """
    if not isinstance(value, dict) or not value:
        raise ValueError("`checks` is an object with a constraint or more")
    for kind, wanted in value.items():
        if kind not in _KINDS:
            near = get_close_matches(str(kind), _KINDS, n=1)
            known = f"did you mean `{near[0]}`?" if near else f"there are `{'`, `'.join(_KINDS)}`"
            raise ValueError(f"there is no check `{kind}`; {known}")
        if not _KINDS[kind].takes(wanted):
            raise ValueError(f"the check `{kind}` takes {_KINDS[kind].says}, not {json.dumps(wanted)[:80]}")
    return tuple(Check(kind, wanted) for kind, wanted in value.items())


def words_of(text: str) -> list[str]:
    """Returns the words of a text: what stands between blanks and holds a letter or a digit."""
    return [word for word in text.split() if any(letter.isalnum() for letter in word)]


def sentences_of(text: str) -> list[str]:
    """Returns the sentences of a text; what stands on a line of its own is one, also without a full stop."""
    found = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        begin = 0
        for end in _SENTENCE_END.finditer(line):
            piece = line[begin : end.end()]
            if (_ABBREVIATION.search(piece) and end.end() < len(line)) or _LIST_NUMBER.search(piece):
                continue
            found.append(piece.strip())
            begin = end.end()
        found.append(line[begin:].strip())
    return [sentence for sentence in found if words_of(sentence)]


def items_of(text: str) -> int:
    """Returns how many lines of a text are items of a list: `- milk`, `* milk`, `1. milk`, `2) milk`."""
    return len(_BULLET.findall(text))


def language_of(text: str) -> str | None:
    """Returns the language of a text, of `LANGUAGES`; None where too little tells it."""
    letters = [letter for letter in text if letter.isalpha()]
    if not letters:
        return None
    shares = {name: len(re.findall(f"[{span}]", text)) / len(letters) for name, span in _SCRIPTS.items()}
    if shares["Japanese"] > 0.1:  # it writes with Chinese letters too
        return "Japanese"
    script = max(shares, key=lambda name: shares[name])
    if shares[script] > 0.5:
        return script
    words = re.findall(r"[^\W\d_]+", text.casefold())
    hits = {
        name: sum(word in set(common.split()) for word in words) for name, common in _COMMON_WORDS.items()
    }
    best, second = sorted(hits, key=lambda name: hits[name], reverse=True)[:2]
    return best if hits[best] >= 2 and hits[best] > hits[second] else None


def _within(count: int, wanted: Mapping[str, int]) -> bool:
    return (
        count >= wanted.get("at_least", 0)
        and count <= wanted.get("at_most", count)
        and count == wanted.get("exactly", count)
    )


def times(text: str, wanted: str) -> int:
    """Returns how often something occurs in a text; what begins or ends with a letter does so as a word."""
    before = r"(?<!\w)" if wanted[0].isalnum() else ""
    behind = r"(?!\w)" if wanted[-1].isalnum() else ""
    return len(re.findall(before + re.escape(wanted) + behind, text, re.IGNORECASE))


def _parts(border: str, text: str) -> int:
    return len(re.split(border, text)) if text else 0


def _is_json(text: str, keys: Sequence[str]) -> bool:
    """Whether a text is JSON and nothing else, maybe in a fence, and has the keys that are named."""
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict | list):
        return False
    return not keys or (isinstance(value, dict) and set(keys) <= set(value))


def _has_case(text: str, wanted: str) -> bool:
    changed = text.upper() if wanted == "upper" else text.lower()
    return text == changed and any(letter.isalpha() for letter in text)


def _is_bounds(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and set(value) <= set(_BOUNDS)
        and all(type(number) is int and number >= 0 for number in value.values())
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


class _Kind(NamedTuple):
    """A kind of constraint: what may be wanted, how that is said, and whether an answer is so."""

    takes: Callable[[Any], bool]
    says: str
    holds: Callable[[str, Any], bool]


_COUNT = 'bounds such as {"at_least": 2, "at_most": 5} or {"exactly": 3}'
_KINDS = {
    "words": _Kind(_is_bounds, _COUNT, lambda text, wanted: _within(len(words_of(text)), wanted)),
    "sentences": _Kind(_is_bounds, _COUNT, lambda text, wanted: _within(len(sentences_of(text)), wanted)),
    "paragraphs": _Kind(_is_bounds, _COUNT, lambda text, wanted: _within(_parts(r"\n\s*\n", text), wanted)),
    "lines": _Kind(_is_bounds, _COUNT, lambda text, wanted: _within(_parts(r"\n\s*", text), wanted)),
    "items": _Kind(_is_bounds, _COUNT, lambda text, wanted: _within(items_of(text), wanted)),
    "characters": _Kind(_is_bounds, _COUNT, lambda text, wanted: _within(len(text), wanted)),
    "contains": _Kind(
        _is_texts,
        'a list of texts such as ["sea", "salt"]',
        lambda text, wanted: all(times(text, one) for one in wanted),
    ),
    "lacks": _Kind(
        _is_texts,
        'a list of texts such as ["sea", ","]',
        lambda text, wanted: not any(times(text, one) for one in wanted),
    ),
    "times": _Kind(
        lambda value: isinstance(value, dict) and bool(value) and all(map(_is_text, value))
        and all(map(_is_bounds, value.values())),
        'texts with bounds such as {"sea": {"exactly": 2}}',
        lambda text, wanted: all(_within(times(text, one), bounds) for one, bounds in wanted.items()),
    ),
    "starts_with": _Kind(
        _is_text, "a text", lambda text, wanted: text.casefold().startswith(wanted.strip().casefold())
    ),
    "ends_with": _Kind(
        _is_text, "a text", lambda text, wanted: text.casefold().endswith(wanted.strip().casefold())
    ),
    "json": _Kind(
        lambda value: isinstance(value, list) and all(map(_is_text, value)),
        'the keys of the object such as ["name", "age"], or [] for any JSON',
        _is_json,
    ),
    "case": _Kind(lambda value: value in ("upper", "lower"), "`upper` or `lower`", _has_case),
    "language": _Kind(
        lambda value: value in LANGUAGES,
        f"one of {', '.join(LANGUAGES)}",
        lambda text, wanted: language_of(text) == wanted,
    ),
    "stops": _Kind(lambda value: value is True, "true", lambda text, wanted: True),
}  # fmt: skip
