"""Text that somebody else chose, as people see it: it prints, is one line, and no two texts look the same."""

import itertools
import os
import subprocess

import pytest

from persona.shown import line, word, words

NASTY = ["", "ls", "git status", "a'b", "a\\b", "\\x1b", "\x1b[2J", "\n", "\t x", "-", "é", "…", "\u202egpj", "\udcff",
         "\ud800", "$HOME", "`id`", "'", '"', "a b'", "~", "#!/bin/sh", "\x85", "\udc85", "\U000e0001",
         "x" * 5000]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_a_word_prints_and_no_other_text_has_it(text: str) -> None:
    shown = word(text)
    assert shown.isprintable()
    assert [other for other in NASTY if word(other) == shown] == [text]


@pytest.mark.parametrize("text", [text for text in NASTY if len(text) < 5000 and "\ud800" not in text])
def test_a_shell_reads_a_word_as_the_text_that_it_stands_for(text: str) -> None:
    told = ["bash", "-c", f"printf %s {word(text)}"]
    done = subprocess.run(told, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"}, check=True)
    assert done.stdout == os.fsencode(text)


def test_where_one_argument_ends_can_be_told() -> None:
    lines = [("a", "b"), ("a b",), ("'a", "b'"), ("a", "", "b"), ("a", "b", ""), ("a' 'b",), ("a…",), ("a", "…")]
    assert all(words(one) != words(other) for one, other in itertools.combinations(lines, 2))
    assert words(("git status", "-sS", "10.0.0.0/8")) == "'git status' -sS 10.0.0.0/8"


@pytest.mark.parametrize(
    "argv", [("ls", *["x" * 50] * 20), ("x" * 5000,), ("\x1b" * 5000,), ("ls",) * 5000, ("\U000e0001" * 300, "y")]
)
def test_a_long_command_line_is_cut_and_says_so(argv: tuple[str, ...]) -> None:
    shown = words(argv, 100)
    assert shown.endswith("…")
    assert len(shown) <= 105
    assert shown.isprintable()


def test_a_sentence_stays_a_sentence() -> None:
    assert (
        line("not in its whitelist; 'persona list' shows what is")
        == "not in its whitelist; 'persona list' shows what is"
    )
    assert line("a\x1b]0;x\x07\udcff\n") == r"a\x1b]0;x\x07\xff\n"
