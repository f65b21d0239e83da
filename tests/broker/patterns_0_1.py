"""The matcher of version 0.1, as it was released: only to compare the new one with it.  Do not mend it."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import translate

from persona.decisions import Program
from persona.parsing import Bad

# Where a bare name is looked for: the directories of Debian's ENV_SUPATH.
SECURE_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
PATTERN_MAX = 4096  # characters
TOKENS_MAX = 128
_USR_MERGED = re.compile(r"^/(bin|sbin|lib|lib32|lib64|libx32)(?=/)")
_GLOB = re.compile(r"[*?\[]")
# How C libraries name their loaders: ld.so, ld-linux-x86-64.so.2, ld64.so.2, ld-2.36.so, ld-musl-x86_64.so.1
LOADER_NAME = re.compile(r"ld(?:64)?(?:-[A-Za-z0-9._-]+)?\.so(?:\.[0-9.]+)?")

Arguments = tuple[str, ...]
_Test = Callable[[str], object]


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
    _path: _Test | None = field(compare=False, repr=False)
    _tests: tuple[_Test | None, ...] = field(compare=False, repr=False)
    _open: bool = field(compare=False, repr=False)

    def is_about(self, program: Program) -> bool:
        """Whether the program, whatever its arguments, is one that this pattern names."""
        if self.key is not None:
            return self.key in program.names or self.key in program.paths
        if self._path is None:
            return True
        return any(self._path(path) for path in program.paths)

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
        tests, given = self._tests, argv[1:]
        if len(given) < len(tests) or (len(given) > len(tests) and not self._open):
            return False
        return all(test is None or test(arg) for test, arg in zip(tests, given, strict=False))

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
        tokens = shlex.split(source.removeprefix("!"))
    except ValueError as error:
        raise Bad(f"{source!r}: {error}", "balance the quotes") from None
    if not tokens or not tokens[0]:
        raise Bad("an empty pattern never matches", "name a program, or '**' for any")
    if len(tokens) > TOKENS_MAX:
        raise Bad(f"{len(tokens)} words, at most {TOKENS_MAX} are allowed")
    program, *arguments = tokens
    key, path_test = _program(program)
    open_end = bool(arguments) and arguments[-1] == "**"
    if open_end:
        arguments.pop()
    for argument in arguments:
        if argument == "**":
            raise Bad(f"{source!r}: '**' is only for the end", "use '*' for one argument of any text")
    if program == "**" and (arguments or open_end):
        raise Bad(f"{source!r}: arguments of any program have no meaning", "write '**' alone")
    looks = len(tokens) > 1 and not (open_end and not arguments)
    fixed = looks and not open_end and not any(map(_GLOB.search, arguments))
    return Pattern(source, negative, key, looks, fixed, path_test, tuple(map(_argument, arguments)), open_end)


def usr_merged(path: str) -> str:
    """``/bin/ls`` as ``/usr/bin/ls``: on Debian ``/bin`` and its like are links into ``/usr``."""
    return _USR_MERGED.sub(r"/usr/\1", path)


def _program(word: str) -> tuple[str | None, _Test | None]:
    if word == "**":
        return None, None
    if not word.startswith("/"):
        if "/" in word:
            raise Bad(f"{word!r}: a relative path never matches", "write the absolute path or the bare name")
        if _GLOB.search(word):
            raise Bad(f"{word!r}: a bare name takes no wildcard", "list the names, or '**' for any program")
        return word, None
    parts = word[1:].split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise Bad(f"{word!r}: a path with '.', '..' or an empty part never matches", "write it plainly")
    path = usr_merged(word)
    if "**" in path:
        raise Bad(f"{word!r}: '**' has no meaning in a path", "use '*', which stays within one directory")
    if not _GLOB.search(path):
        return path, None
    # '*' and '?' never cross a slash: each part is translated for itself
    expression = "/".join("[^/]*".join(map(re.escape, part.split("*"))) for part in path.split("/"))
    return None, re.compile(expression.replace(r"\?", "[^/]")).fullmatch


def _argument(word: str) -> _Test | None:
    if word == "*":
        return None
    if not _GLOB.search(word):
        return word.__eq__
    return re.compile(translate(word), re.DOTALL).match
