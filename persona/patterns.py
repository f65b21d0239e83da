"""Command patterns: what a whitelist says, matched argument by argument and never as a joined string.

``docs/patterns.md`` has the grammar and a table of examples that is also a test.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from persona.decisions import Program
from persona.parsing import Bad
from persona.wildcards import Test, Word, allows, refuses, split

# Where a bare name is looked for: the directories of Debian's ENV_SUPATH.
SECURE_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
PATTERN_MAX = 4096  # characters
WORDS_MAX = 128
_USR_MERGED = re.compile(r"^/(bin|sbin|lib|lib32|lib64|libx32)(?=/)")
# How C libraries name their loaders: ld.so, ld-linux-x86-64.so.2, ld64.so.2, ld-2.36.so, ld-musl-x86_64.so.1
LOADER_NAME = re.compile(r"ld(?:64)?(?:-[A-Za-z0-9._-]+)?\.so(?:\.[0-9.]+)?")

Arguments = tuple[str, ...]
_Tests = tuple[Test | None, ...]  # one for each word; None is '*', any argument


@dataclass(frozen=True, slots=True)
class Pattern:
    """One line of a whitelist.

    ``key`` is what an index may look the pattern up by: a bare name or a literal absolute path;
    ``None`` for any program or a path with a wildcard.  Equality is that of the text.
    """

    text: str
    negative: bool = field(compare=False)
    key: str | None = field(compare=False)
    looks_at_arguments: bool = field(compare=False)
    fixed_arguments: bool = field(compare=False)  # every argument is given, none is the user's choice
    words: tuple[Word, ...] = field(compare=False, repr=False)  # the program's first
    _path: Test | None = field(compare=False, repr=False)
    _parts: tuple[_Tests, ...] = field(compare=False, repr=False)  # of the arguments; between two of them is a '**'

    def is_about(self, program: Program) -> bool:
        """Whether the program, whatever its arguments, is one that this pattern names.

        The path of the file itself names it also where it was called by another of its names, but only to
        refuse it: an allowance of one of a file's programs allows no other.
        """
        if self.key is not None:
            found = self.key in program.names or self.key in program.paths
            return found or (self.negative and self.key == program.path)
        if self._path is None:
            return True
        return any(map(self._path, program.paths)) or (self.negative and self._path(program.path))

    def counts_for(self, program: Program) -> bool:
        """Whether this pattern of a persona's whitelist has a say about the program.

        An ELF loader runs any program that it is given, so only its own name or path allows it, never a
        wildcard; a carve-out with a wildcard refuses it as it refuses the rest.
        """
        return self.is_about(program) and (self.key is not None or self.negative or not is_loader(program))

    def fits(self, argv: Arguments, complete: bool) -> bool:
        """Whether the arguments fit; of an incomplete command line only a carve-out's do."""
        if not self.looks_at_arguments:
            return True
        if not complete:
            return self.negative
        return _fit(self._parts, argv)

    def matches(self, program: Program, argv: Arguments, complete: bool = True) -> bool:
        """Program and arguments."""
        return self.is_about(program) and self.fits(argv, complete)


def is_loader(program: Program) -> bool:
    """Whether the program is an ELF loader: the agent says so, or one of its names is a loader's.

    The names are for agents that do not tell yet, and for ``explain``, which sees no file.
    """
    if program.loader:
        return True
    paths = (program.path, *program.paths)
    return any(map(LOADER_NAME.fullmatch, (*program.names, *(path.rpartition("/")[2] for path in paths))))


def parse_pattern(value: object) -> Pattern:
    """Reads one pattern.  Raises ``Bad`` for one that is malformed or could never match."""
    if not isinstance(value, str):
        raise Bad(f"expected a command pattern, not {value!r}", "put it in quotes")
    source = value.strip()
    if len(source) > PATTERN_MAX or not source.isprintable():
        raise Bad(f"expected at most {PATTERN_MAX} printable characters on one line")
    negative = source.startswith("!")
    try:
        words = split(source.removeprefix("!"))
    except ValueError as error:
        raise Bad(f"{source!r}: {error}", "balance the quotes") from None
    if not words or not words[0].text:
        raise Bad("an empty pattern never matches", "name a program, or '**' for any")
    if len(words) > WORDS_MAX:
        raise Bad(f"{len(words)} words, at most {WORDS_MAX} are allowed")
    program, *arguments = words
    key, path_test = _program(program, negative=negative)
    if program.is_many and arguments:
        raise Bad(f"{source!r}: arguments of any program have no meaning", "write '**' alone")
    looks = any(not word.is_many for word in arguments)
    fixed = looks and all(word.is_literal for word in arguments)
    parts: list[list[Test | None]] = [[]]
    for word in arguments:
        if word.is_many:
            parts.append([])
        else:
            parts[-1].append(_argument(word, negative=negative))
    return Pattern(source, negative, key, looks, fixed, words, path_test, tuple(map(tuple, parts)))


def usr_merged(path: str) -> str:
    """``/bin/ls`` as ``/usr/bin/ls``: on Debian ``/bin`` and its like are links into ``/usr``."""
    return _USR_MERGED.sub(r"/usr/\1", path)


def _program(word: Word, *, negative: bool) -> tuple[str | None, Test | None]:
    """The key of the first word, or a test for paths; neither where it is ``**``."""
    text = word.text
    if word.is_many:
        return None, None
    if not text.startswith("/"):
        if "/" in text:
            own = text.startswith(("~", "$HOME/", "${HOME}/"))
            fix = "write the absolute path or the bare name"
            home = "a program in its user's home belongs into home_programs"
            raise Bad(f"{text!r}: a relative path never matches", home if own else fix)
        if not word.is_literal:
            raise Bad(f"{text!r}: a bare name takes no wildcard", "list the names, or '**' for any program")
        return text, None
    *folders, last = text[1:].split("/")
    if any(part in ("", ".", "..") for part in (*folders, last)):
        is_folder = not last and folders and not any(part in ("", ".", "..") for part in folders)
        fix = f"for the programs in that folder write '{text}*'" if is_folder else "write it plainly"
        raise Bad(f"{text!r}: a path with '.', '..' or an empty part never matches", fix)
    if word.is_literal:
        return usr_merged(text), None
    if _USR_MERGED.match(word.prefix):
        word = Word(usr_merged(text), (usr_merged(word.prefix), *word.tokens[1:]))
    return None, refuses(word) if negative else allows(word)


def _argument(word: Word, *, negative: bool) -> Test | None:
    if word.is_any:
        return None
    if word.is_path and not word.is_literal and ".." in word.text.split("/"):
        raise Bad(f"{word.text!r}: no argument with '..' matches a wildcard", "write the path without '..'")
    return refuses(word) if negative else allows(word)


def _fit(parts: Sequence[_Tests], argv: Arguments) -> bool:
    """Whether the arguments fit the parts, which any number of arguments separates.

    Each part but the first and last is taken where it comes first, which leaves the most to the later ones: so
    this takes at most (arguments x words of a part) tests.
    """
    head, tail = parts[0], parts[-1]
    begin, end = 1 + len(head), len(argv) - (len(tail) if len(parts) > 1 else 0)
    if begin > end if len(parts) > 1 else begin != max(len(argv), 1):
        return False
    if not _all(head, argv, 1):
        return False
    if len(parts) == 1:
        return True
    if not _all(tail, argv, end):
        return False
    for part in parts[1:-1]:
        while begin + len(part) <= end and not _all(part, argv, begin):
            begin += 1
        begin += len(part)
        if begin > end:
            return False
    return True


def _all(tests: _Tests, argv: Arguments, at: int) -> bool:
    for index, test in enumerate(tests, at):  # noqa: SIM110 - a generator costs more, and this is asked at every exec
        if test is not None and not test(argv[index]):
            return False
    return True


@dataclass(frozen=True, slots=True)
class Whitelist:
    """Patterns and carve-outs: what any pattern matches and no carve-out does.

    A persona's whitelist says what may run: ask it ``allows`` and ``counting``.  A policy's ``commands``
    say which requests it is for: ask them ``speaks_for`` and ``about``.  They differ for ELF loaders,
    which a policy for ``**`` is for like any program, and which a persona's ``**`` does not allow.
    """

    patterns: tuple[Pattern, ...]

    def allows(self, program: Program, argv: Arguments, complete: bool = True) -> bool:
        """Of a persona: whether this command line may run."""
        return _matched(self.counting(program), argv, complete)

    def counting(self, program: Program) -> tuple[Pattern, ...]:
        """Of a persona: the patterns that have a say about this program, in order."""
        return tuple(pattern for pattern in self.patterns if pattern.counts_for(program))

    def speaks_for(self, program: Program, argv: Arguments, complete: bool = True) -> bool:
        """Of a policy: whether it is for this command line."""
        return _matched(self.about(program), argv, complete)

    def about(self, program: Program) -> tuple[Pattern, ...]:
        """Of a policy: the patterns that name this program, in order."""
        return tuple(pattern for pattern in self.patterns if pattern.is_about(program))


def _matched(patterns: tuple[Pattern, ...], argv: Arguments, complete: bool) -> bool:
    """Whether, of patterns that name the program, one fits the arguments and no carve-out does."""
    fitting = [pattern for pattern in patterns if pattern.fits(argv, complete)]
    return bool(fitting) and not any(pattern.negative for pattern in fitting)


WHITELIST_MAX = 1024


def check_whitelist(patterns: tuple[Pattern, ...]) -> list[tuple[int, str, str]]:
    """Patterns that are pointless: (index, what is wrong, fix)."""
    found: list[tuple[int, str, str]] = []
    first: dict[str, int] = {}
    wholly = {p.key for p in patterns if p.negative and not p.looks_at_arguments and p.key}
    named = {p.key for p in patterns if not p.negative}
    for index, pattern in enumerate(patterns):
        if pattern.text in first:
            found.append((index, f"{pattern.text!r} is there twice", "remove one"))
        first.setdefault(pattern.text, index)
        if not pattern.negative and pattern.key in wholly:
            found.append(
                (
                    index,
                    f"{pattern.text!r} can never match: '!{pattern.key}' carves it out",
                    "remove one of the two",
                )
            )
        if pattern.negative and pattern._path is None and pattern.key is None:
            found.append((index, "'!**' leaves nothing", "remove it, or leave the whole list empty"))
        elif pattern.negative and pattern.key and None not in named and pattern.key not in named:
            found.append((index, f"{pattern.text!r} carves out of nothing", "remove it, or allow the program first"))
    return found
