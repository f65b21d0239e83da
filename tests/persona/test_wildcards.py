"""Words with wildcards: as a shell splits them, as a slow and plain reading matches them, and in bounded time."""

import os
import posixpath
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from persona.decisions import Program
from persona.patterns import parse_pattern
from persona.wildcards import Among, Token, Wild, Word, allows, climbs, matches, refuses, split, whole

CHARS = "ab.*?/[]!-=:\\'\" \n"
WORDS = st.text("aab..**?//[]!=:\\", max_size=10).map(whole)
TEXTS = st.text("aab..//=:-\n", max_size=12)


# --- the reference: every way is tried --------------------------------------------------------------


def glob(tokens: Sequence[Token], text: str, *, path: bool) -> bool:
    """Tokens against a text, by trying every length of every wildcard."""
    if not tokens:
        return not text
    token, rest = tokens[0], tokens[1:]
    if isinstance(token, str):
        return text.startswith(token) and glob(rest, text[len(token) :], path=path)
    if token is Wild.ONE or isinstance(token, Among):
        fits = bool(text) and not (path and text[0] == "/") and (token is Wild.ONE or token.has(text[0]))
        return fits and glob(rest, text[1:], path=path)
    return any(
        glob(rest, text[end:], path=path)
        for end in range(len(text) + 1)
        if not (path and token is Wild.STAR and "/" in text[:end])
    )


def components(word: Word) -> list[list[Token]]:
    found: list[list[Token]] = [[]]
    for token in word.tokens:
        if not isinstance(token, str):
            found[-1].append(token)
            continue
        first, *others = token.split("/")
        found[-1] += [first] if first else []
        found += [[other] if other else [] for other in others]
    return found


def along(parts: Sequence[Sequence[Token]], names: Sequence[str], *, strict: bool) -> bool:
    """The components of a path word against those of a text."""
    if not parts:
        return not names
    part, rest = parts[0], parts[1:]
    if list(part) == [Wild.DEEP]:
        if not rest:
            return bool(names) and not (strict and all(name in ("", ".") for name in names))
        return any(along(rest, names[count:], strict=strict) for count in range(len(names) + 1))
    wild = any(not isinstance(token, str) for token in part)
    if not names or (strict and wild and names[0] in ("", ".")):
        return False
    return any(
        glob(part, "/".join(names[:count]), path=True) and along(rest, names[count:], strict=strict)
        for count in range(1, len(names) + 1)
    )


def plainly(word: Word, text: str, *, strict: bool = True) -> bool:
    if word.is_literal:
        return text == word.text
    if not word.is_path:
        return glob(word.tokens, text, path=False)
    if strict and climbs(text):
        return False
    return along(components(word), text.split("/"), strict=strict)


@settings(max_examples=500, deadline=None)
@given(WORDS, TEXTS)
@example(whole("**/a"), "/a")
@example(whole("**/**/a"), "a")
@example(whole("a/**/**"), "a/b")
@example(whole("/a**b/*"), "/ac/d/b/.")
@example(whole("*/?"), "\n/.")
def test_it_matches_what_a_plain_reading_matches(word: Word, text: str) -> None:
    assert allows(word)(text) is plainly(word, text)


def drawn(word: Word, draw: st.DataObject) -> str:
    """A text that is likely to match."""
    return "".join(
        token if isinstance(token, str) else draw.draw(st.text("ab./", max_size=1 if token is Wild.ONE else 4))
        for token in word.tokens
    )


@settings(max_examples=500, deadline=None)
@given(WORDS, st.data())
def test_also_for_texts_that_nearly_match(word: Word, data: st.DataObject) -> None:
    text = drawn(word, data)
    assert allows(word)(text) is plainly(word, text)
    if plainly(word, text, strict=False) or plainly(word, text):
        assert refuses(word)(text)  # a carve-out takes all that an allowance takes


@settings(max_examples=300, deadline=None)
@given(st.text(CHARS, max_size=14))
def test_words_are_those_of_a_shell(source: str) -> None:
    try:
        expected = shlex.split(source)
    except ValueError:
        with pytest.raises(ValueError):
            split(source)
        return
    assert [word.text for word in split(source)] == expected


@settings(max_examples=500, deadline=None)
@given(st.text(CHARS, max_size=14))
def test_a_word_can_be_written_again(source: str) -> None:
    try:
        words = split(source)
    except ValueError:
        return
    assert [word.tokens for word in split(" ".join(map(str, words)))] == [word.tokens for word in words]


@given(st.text(max_size=8))
def test_what_is_quoted_stands_for_itself(text: str) -> None:
    (word,) = split(shlex.quote(text))
    assert word.is_literal
    assert word.text == text


@pytest.mark.parametrize(
    ("source", "fits", "fails"),
    [
        (r"\*", ["*"], ["x", ""]),
        ("'*'?", ["*x"], ["xx", "*"]),
        ('"[a]"', ["[a]"], ["a"]),
        ("[a-c]x", ["ax", "cx"], ["dx", "-x", "x"]),
        ("[!a]", ["b", "\n", "/"], ["a", "", "bb"]),
        ("[^a]", ["b"], ["a", "^x"]),
        ("[]a]", ["]", "a"], ["b", "]a"]),
        (r"[\]a]", ["]", "a"], ["]a", "\\"]),
        ("[a-]", ["a", "-"], ["b"]),
        ("[", ["["], ["a", ""]),
        ("[a", ["[a"], ["a"]),
        ("[a/b]", ["[a/b]"], ["a", "/", "b"]),
        ("x/[!a]", ["x/b"], ["x/a", "x//", "x/", "x/."]),
        ("a?c", ["abc", "a/c", "a\nc"], ["ac", "abbc"]),
        ("/a?c", ["/abc"], ["/a/c"]),
        ("***", ["", "a/b"], []),
        ("a/**", ["a/b", "a/b/c", "a/b/", "a//b", "a/./b", "a/\n"], ["a", "a/", "a//", "a/.", "a/./", "a/../b"]),
        ("**/x", ["x", "/x", "a/x", "/a/b/x"], ["ax", "a/xx", "x/", "../x", "a/../x"]),
        ("/a/**/x", ["/a/x", "/a/b/x", "/a/b/c/x"], ["/ax", "/a/bx", "/x"]),
        ("/srv/*/bin/tool", ["/srv/a/bin/tool"], ["/srv/bin/tool", "/srv//bin/tool", "/srv/./bin/tool"]),
        ("/srv/a**z", ["/srv/az", "/srv/a/z", "/srv/ab/c/z"], ["/srv/a", "/srv/az/"]),
        ("--file=**/x", ["--file=/x", "--file=a/x"], ["--file=x", "--file=../x", "x", "--file=a/.."]),
        ("-I/usr/**", ["-I/usr/a"], ["-I/usr/../x"]),
        ("-I*/x", ["-Ia/x"], ["-I../x", "-Ia/b/x"]),
        ("o=/a/**", ["o=/a/b", "o=/a/b..c/d", "o=/a/b../c"], ["o=/a/b,u=../x", "o=/a/b:..", "o=/a/b:../c", "o=/a/.."]),
        ("https://*/x", ["https://a/x"], ["https://a/b/x", "https:///x"]),
    ],
)  # fmt: skip
def test_single_words(source: str, fits: list[str], fails: list[str]) -> None:
    (word,) = split(source)
    assert [text for text in fits if not allows(word)(text)] == []
    assert [text for text in fails if allows(word)(text)] == []
    assert [text for text in fits if not plainly(word, text)] == []  # the reference itself is right
    assert [text for text in fails if plainly(word, text)] == []


@pytest.mark.parametrize(
    "text",
    ["..", "/..", "a/..", "../a", "a/../b", "x=..", "x=../a", "h:../a", "-C..", "a/..\n", "a\n../b", "@../x"],
)
def test_what_climbs(text: str) -> None:
    assert climbs(text)


@pytest.mark.parametrize(
    "text", ["", ".", "...", "a..", "..a", "a/..b", "a/b..", "main..dev", "origin/main..", "-Cx.."]
)
def test_what_does_not_climb(text: str) -> None:
    assert not climbs(text)


# --- carve-outs: nothing that leads there passes --------------------------------------------------

NAMES = st.sampled_from(["etc", "x", "..", ".", "", "shadow"])
PATHS = st.lists(NAMES, max_size=7).map(lambda names: "/" + "/".join(names))


@settings(max_examples=300, deadline=None)
@given(PATHS)
@example("/etc/../etc/shadow")
@example("//etc/shadow")
@example("/etc/./shadow/.")
@example("/etc")
def test_no_spelling_of_an_absolute_path_passes_a_carve_out(text: str) -> None:
    real = posixpath.normpath(text).replace("//", "/")
    if real == "/etc" or real.startswith("/etc/"):
        assert refuses(whole("/etc/**"))(text)
    if real == "/etc/shadow":
        assert refuses(whole("/etc/shadow"))(text)
        assert refuses(whole("/etc/s*"))(text)
        assert refuses(whole("/**/shadow"))(text)


def test_no_link_helps_past_a_carve_out(tmp_path: Path) -> None:
    """What '..' is depends on links, so the text alone cannot tell; each text with one is refused."""
    (tmp_path / "etc" / "ssh").mkdir(parents=True)
    (tmp_path / "etc" / "shadow").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "link").symlink_to("../etc/ssh")
    text = f"{tmp_path}/home/link/../shadow"
    assert os.path.realpath(text) == f"{tmp_path}/etc/shadow"
    assert posixpath.normpath(text) == f"{tmp_path}/home/shadow"
    assert refuses(whole(f"{tmp_path}/etc/**"))(text)
    assert not allows(whole(f"{tmp_path}/home/**"))(text)


# --- sequences of words ---------------------------------------------------------------------------

ARGUMENTS = ("a", "b", "ab", "/x/a", "", "..")
CHOICE = ("a", "b", "*", "**", "a*", "?", "/x/*", "''")


def sequence(words: Sequence[Word], given: Sequence[str], *, negative: bool) -> bool:
    if not words:
        return not given
    first, rest = words[0], words[1:]
    if first.is_many:
        return any(sequence(rest, given[count:], negative=negative) for count in range(len(given) + 1))
    test = refuses(first) if negative else allows(first)
    return bool(given) and (first.is_any or test(given[0])) and sequence(rest, given[1:], negative=negative)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(CHOICE), max_size=7), st.lists(st.sampled_from(ARGUMENTS), max_size=7), st.booleans())
def test_words_match_arguments_as_a_plain_reading_does(words: list[str], given: list[str], negative: bool) -> None:
    pattern = parse_pattern(" ".join([*(["!tool"] if negative else ["tool"]), *words]))
    program = Program("/usr/bin/tool", ("tool",), ("/usr/bin/tool",))
    expected = not words or sequence(pattern.words[1:], given, negative=negative)
    assert pattern.matches(program, ("tool", *given)) is expected
    assert pattern.looks_at_arguments or expected  # what looks at none takes any
    if pattern.fixed_arguments and not negative:
        assert expected is (list(given) == [word.text for word in pattern.words[1:]])


# --- time -----------------------------------------------------------------------------------------

LONG = 60_000
SLOW = [
    ("*a*a*a*a*a*a*a*a*b", "a" * LONG),
    ("/*a*a*a*a*a*a*a*a*b", "/" + "a" * LONG),
    ("/**a**a**a**a**a**b", "/" + "a/" * (LONG // 2)),
    ("/**/a/**/a/**/a/**/b", "/a" * (LONG // 2)),
    ("/" + "**/*" * 100 + "b", "/a" * (LONG // 2)),
    ("?*" * 100 + "b", "a" * LONG),
    ("x/**", "x/" + "./" * (LONG // 2)),
    ("x/**", "x/" + "./" * (LONG // 2) + "a"),
    ("x/**", "x/" + "/" * LONG + "a"),
    ("**/**/**", "./" * (LONG // 2) + "a"),
    ("x/*/**", "x/a/" + "./" * (LONG // 2) + "."),
    ("x/*", "x/" + "../" * (LONG // 3)),
    ("/x", "/x" + "/." * (LONG // 2) + "a"),
    ("=/**", "=/" + "a" * LONG),
    ("/*" + "[a-z]" * 800 + "9", "/" + "a" * LONG + "9"),
    ("*" + "[a-z][b-z]" * 400 + "9", "b" * LONG + "9"),
]


@pytest.mark.parametrize(("pattern", "text"), SLOW)
def test_no_word_takes_long(pattern: str, text: str) -> None:
    began = time.process_time()
    allows(whole(pattern))(text)
    refuses(whole(pattern))(text)
    assert time.process_time() - began < 5  # some 0.3 s


@pytest.mark.parametrize(
    "pattern",
    [
        "tool ** a ** a ** a ** a ** b",
        "tool ** a a a a a a a a b **",
        "tool " + "** a* " * 60 + "b",
        "tool ** *a* *b* ** c",
    ],
)
def test_no_number_of_arguments_takes_long(pattern: str) -> None:
    began = time.process_time()
    assert not parse_pattern(pattern).fits(("tool", *["a"] * LONG), complete=True)
    assert time.process_time() - began < 5


def test_one_word_of_other_lists() -> None:
    assert matches("vm-1", "vm-*")
    assert matches("vm-1", "*")
    assert not matches("db-1", "vm-*")
    assert matches("db-1", "db-?")
    assert matches("/opt/x", "/opt/*")
    assert not matches("/opt/x/y", "/opt/*")
    assert matches("/opt/x/y", "/opt/**")
    assert matches("/opt/a b'c", "/opt/a b'*")
    assert matches("/opt/*", r"/opt/\*")
    assert not matches("/opt/x", r"/opt/\*")
