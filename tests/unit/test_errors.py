"""What a message may hold of a user's data: one line, a bounded length, nothing that a terminal obeys."""

from __future__ import annotations

import pickle
import unicodedata

import pytest

from data_tools.errors import SHOWN, UsageError, UserError, shown
from data_tools.format.tar import TarDamageError

HOSTILE = "a\x1b]0;title\x07\x1b[2J\nb\tc\x00\x7f\x9b31m\u202eevil\u2066\ud83d\x85end"


def obeyed(text: str) -> list[str]:
    """Control characters and surrogates by Unicode's own tables, and what overrides the direction of writing."""
    overrides = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return [
        c
        for c in text
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in overrides
    ]


def test_no_control_character_is_printed_raw():
    characters = obeyed("".join(map(chr, range(0x11_0000))))
    assert len(characters) > 2000
    assert [hex(ord(one)) for one in characters if obeyed(shown(f"a{one}b"))] == []


def test_hostile_text_stays_on_one_line_and_is_legible():
    text = shown(HOSTILE)
    assert not obeyed(text)
    assert text == r"a\x1b]0;title\x07\x1b[2J b c\x00\x7f\x9b31m\u202eevil\u2066\ud83d end"
    text.encode()  # as stderr does


def test_words_of_any_language_pass():
    for text in (
        "ein Bild: \u00e4\u00f6\u00fc",
        "\u732b\u7684\u7167\u7247",
        "\u0645\u0631\u062d\u0628\u0627\u200f!",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "x" * SHOWN,
    ):
        assert shown(text) == text


@pytest.mark.parametrize(
    "data",
    ["x" * 301, "\x1b" * 300, b"\xff" * 500_000, ["word"] * 10**5, "a " * 10**6, "\n" * 999 + "b" * 400],
    ids=["text", "escapes", "bytes", "list", "words", "lines"],
)
def test_long_data_keep_beginning_end_and_length(data):
    text = shown(data)
    assert len(text) <= SHOWN
    assert len(shown(data, 60)) <= 60
    assert f"({len(' '.join(str(data).split()))} characters)" in text
    assert text[-6:] == shown(str(data)[-9:])[-6:]


def test_every_part_of_an_error_is_bounded():
    parts = {name: f"{name}" + HOSTILE * 1000 for name in ("what", "got", "expected", "remedy")}
    message = str(UserError(parts.pop("what"), **parts))
    assert len(message) < 4 * SHOWN + 40
    assert not obeyed(message)
    assert [part.split()[0] for part in message.split("; ") if part.split()[0] in ("got", "expected", "remedy:")]


def test_an_error_inside_an_error_stays_whole_and_crosses_processes():
    inner = UserError("w" * 280, got="g" * 280, expected="e" * 280, remedy="r" * 280)
    assert str(inner) in str(UserError("a rank failed", got=inner))
    assert str(UserError(inner)) == str(inner)
    for error in (inner, UsageError("u", got=1), TarDamageError("a.tar", 512, "a hole")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.exit_code, vars(copy)) == (
            type(error),
            str(error),
            error.exit_code,
            vars(error),
        )
