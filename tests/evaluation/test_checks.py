# ruff: noqa: RUF001
"""Each constraint with answers that meet it, answers that do not, and answers at its edge."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from mamba_sft.evaluation.checks import (
    LANGUAGES,
    Check,
    items_of,
    language_of,
    read_checks,
    sentences_of,
    words_of,
)

THREE_WORDS = {"exactly": 3}


@pytest.mark.parametrize(
    ("kind", "wanted", "right", "wrong"),
    [
        ("words", THREE_WORDS, ["one two three", "  one\ntwo - three ", "don't well-known 3"],
         ["", "one two", "a b c d"]),
        ("words", {"at_least": 2}, ["a b", "a b c"], ["a", "", "- -"]),
        ("words", {"at_most": 2}, ["a b", "", "a - b"], ["a b c"]),
        ("words", {"at_least": 2, "at_most": 3}, ["a b", "a b c"], ["a", "a b c d"]),
        ("sentences", {"exactly": 2}, ["It rains. It pours!", "A line\nAnother", 'He said "Go." She went.'],
         ["It rains.", "One. Two. Three.", ""]),
        ("sentences", {"exactly": 1},
         ["Dr. Ito came, e.g. on Monday.", "It costs 3.50 euros", "J. S. Bach wrote it."],
         ["Yes. No.", "...", "What? Why?"]),
        ("paragraphs", {"exactly": 2}, ["a\n\nb", "a\n \n\nb\n"], ["a\nb", "a\n\nb\n\nc", ""]),
        ("lines", {"exactly": 2}, ["a\nb", "a\n\nb"], ["a", "a\nb\nc"]),
        ("items", THREE_WORDS, ["- a\n- b\n- c", "Here:\n1. a\n2. b\n3) c", "* a\n• b\n+ c"],
         ["- a\n- b", "a\nb\nc", "-a\n-b\n-c", "1.a\n2.b\n3.c", "- a\n- b\n- c\n- d"]),
        ("characters", {"at_most": 5}, ["12345", " 123 \n"], ["123456"]),
        ("contains", ["sea", "salt"], ["Salt is in the SEA.", "sea-salt"], ["seaside salt", "the sea", ""]),
        ("contains", ["C++"], ["I like c++!"], ["I like C+"]),
        ("lacks", ["sea"], ["seaside", ""], ["The sea.", "SEA"]),
        ("lacks", [","], ["no comma"], ["a,b"]),
        ("times", {"sea": {"exactly": 2}}, ["sea, sea", "Sea. The sea; seaside"], ["sea", "sea sea sea", ""]),
        ("times", {"a": {"at_least": 1}, "b": {"at_most": 0}}, ["a"], ["a b", "c"]),
        ("starts_with", "Dear", ["Dear Ana", "  dear all"], ["My dear", ""]),
        ("ends_with", "Goodbye.", ["Well. Goodbye.", "goodbye. \n"], ["Goodbye", "Goodbye. Now"]),
        ("json", ["name"], ['{"name": 1, "age": 2}', '```json\n{"name": []}\n```', ' {"name": null}\n'],
         ['{"age": 2}', '["name"]', 'Here: {"name": 1}', '{"name": 1,}', '{"name": 1', "", "name"]),
        ("json", [], ["[]", "{}", '```\n[1]\n```'], ["1", '"text"', "true", "{'a': 1}", "[" * 100_000]),
        ("case", "upper", ["ALL OF IT, 3!", "ÄÖ"], ["All", "123", ""]),
        ("case", "lower", ["all of it, 3!"], ["All", "", "42"]),
        ("language", "German", ["Das ist nicht der Weg, den ich mit dir gehe."],
         ["This is the way of the sea.", "", "42"]),
        ("language", "French", ["La mer est belle et les vagues sont dans le port."],
         ["Das ist der Hafen und die See."]),
        ("language", "Spanish", ["El mar es grande y los barcos que llegan son para el puerto."],
         ["The sea is big and it is for the boats."]),
        ("language", "Russian", ["Море большое."], ["The sea"]),
        ("language", "Japanese", ["海は広いです。"], ["大海很宽。"]),
        ("language", "Chinese", ["大海很宽。"], ["海は広いです。", "sea"]),
    ],
)  # fmt: skip
def test_what_holds_and_what_does_not(kind: str, wanted: Any, right: list[str], wrong: list[str]) -> None:
    (check,) = read_checks({kind: wanted})
    assert [answer for answer in right if not check.holds(answer)] == []
    assert [answer for answer in wrong if check.holds(answer)] == []


def test_stopping_is_told_by_who_generated() -> None:
    (check,) = read_checks({"stops": True})
    assert check.holds("", stopped=True)
    assert not check.holds("Done.", stopped=False)
    assert check.holds("Done.")  # nobody knows


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "an object"),
        ({}, "a constraint or more"),
        (["words"], "an object"),
        ({"word": {"exactly": 3}}, "no check `word`; did you mean `words`"),
        ({"rhymes": True}, "no check `rhymes`; there are `words`, `sentences`"),
        ({"words": 3}, "`words` takes bounds such as"),
        ({"words": {}}, "`words` takes"),
        ({"words": {"most": 3}}, "`words` takes"),
        ({"words": {"at_most": -1}}, "`words` takes"),
        ({"words": {"at_most": 2.5}}, "not {\"at_most\": 2.5}"),
        ({"words": {"at_most": True}}, "`words` takes"),
        ({"contains": "sea"}, "`contains` takes a list"),
        ({"contains": []}, "`contains` takes a list"),
        ({"lacks": [" "]}, "`lacks` takes a list"),
        ({"times": {"sea": 2}}, "`times` takes texts with bounds"),
        ({"times": {}}, "`times` takes"),
        ({"json": "name"}, "`json` takes the keys"),
        ({"case": "Upper"}, "`upper` or `lower`"),
        ({"language": "Latin"}, "one of English, German"),
        ({"stops": False}, "`stops` takes true"),
        ({"starts_with": ""}, "`starts_with` takes a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_checked_is_told(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        read_checks(value)


def test_checks_keep_what_the_file_says() -> None:
    given = {"words": {"at_most": 3}, "stops": True}
    assert read_checks(given) == (Check("words", {"at_most": 3}), Check("stops", True))


def test_words_sentences_and_items() -> None:
    assert words_of("Well - a 3-year-old's “word” …") == ["Well", "a", "3-year-old's", "“word”"]
    assert sentences_of("1. Milk\n2. Bread") == ["1. Milk", "2. Bread"]
    assert sentences_of("He paid approx. 3 euros. She (Ms. Roy) left...") == [
        "He paid approx. 3 euros.",
        "She (Ms. Roy) left...",
    ]
    assert items_of("(1) a\n  2. b\n3 c\n\n-  d") == 3
    assert items_of("2024 was a year.\nIt went - well") == 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_told(language: str) -> None:
    texts = {
        "English": "The cat sat on the mat and it was happy with that.",
        "German": "Die Katze sitzt auf der Matte und ist mit dem Tag zufrieden.",
        "French": "Le chat est sur le tapis et il dort dans la maison.",
        "Spanish": "El gato está en la alfombra y duerme con los niños.",
        "Italian": "Il gatto è sul tappeto e dorme con i bambini nella casa che non è grande.",
        "Portuguese": "O gato está no tapete e não dorme com as crianças.",
        "Dutch": "De kat zit op de mat en het is een mooie dag voor ons.",
        "Russian": "Кошка сидит на ковре.",
        "Greek": "Η γάτα κάθεται στο χαλί.",
        "Arabic": "القطة تجلس على السجادة.",
        "Hindi": "बिल्ली चटाई पर बैठी है।",
        "Chinese": "猫坐在垫子上。",
        "Japanese": "猫はマットの上に座っています。",
        "Korean": "고양이가 매트 위에 앉아 있다.",
    }
    assert language_of(texts[language]) == language


def test_the_language_of_too_little_is_not_told() -> None:
    assert language_of("cat") is None
    assert language_of("12 !") is None


def test_checking_needs_no_torch() -> None:
    code = (
        "import sys, mamba_sft.evaluation.checks, mamba_sft.evaluation.prompts;"
        "assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
