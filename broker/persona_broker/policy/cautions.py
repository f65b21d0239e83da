"""What a persona's whitelist allows with more behind it than its words say: warnings, which refuse nothing."""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from persona.called_names import listed, siblings
from persona.decisions import Program
from persona.documents import Persona
from persona.patterns import Pattern
from persona.program_facts import (
    BEFORE_COMMANDS,
    IN_SBIN,
    INTERACTIVE,
    LONG_FORMS,
    PROGRAMS,
    PROMPTS,
    Kind,
    kinds_of,
    plain_name,
)
from persona.wildcards import Wild, Word
from persona_broker.policy.misread import Misread, misread

_WORDS = {
    Kind.LOADS: "loads other programs and runs them inside itself, where no whitelist decides them",
    Kind.CODE: "runs any code that its user gives it, which reads and writes what they may; no whitelist decides it",
    Kind.STARTS: "can start other programs, each of which is decided by itself",
    Kind.WRITES: "writes any file that its user may write",
    Kind.READS: "shows any file that its user may read",
}
_OF_A_WILDCARD = {
    Kind.LOADS: "load other programs and run them inside themselves, where no whitelist decides them",
    Kind.CODE: "run any code that their user gives them",
    Kind.STARTS: "can start other programs, each of which is decided by itself",
    Kind.WRITES: "write any file that their user may write",
    Kind.READS: "show any file that their user may read",
}
_IN_HOME = "whoever may write such a file, its user above all, may run anything as that user; no whitelist decides it"
_HOLDS = "resource limits and network rules still hold"
_EXAMPLES = 4
_FOLDER = re.compile(r"(/[^*?]+)/\*")


class Gap(StrEnum):
    """Why an entry does not say what people think."""

    POSITION = "carve_out_by_position"  # an option moves the words that it hangs on
    SPELLING = "carve_out_of_one_spelling"  # the option has other forms
    OTHER_NAMES = "carve_out_of_one_name"  # the file has other names, which stay allowed
    SAID_AGAIN = "option_said_again"  # an allowance fixes an option, which its user may give once more


@dataclass(frozen=True, slots=True)
class Caution:
    """One warning: about which entries of ``field`` (index and text), what is known, and in words."""

    entries: tuple[tuple[int, str], ...]
    kinds: tuple[Kind | Gap | Misread, ...]
    message: str
    field: str = "command_whitelist"


def cautions(persona: Persona) -> list[Caution]:
    """Warnings about a persona, by place: entries that allow the same share one, each with a wildcard has its own."""
    found: list[Caution] = []
    alike: dict[tuple[Kind, ...], list[tuple[int, str]]] = {}
    whitelist = persona.command_whitelist.patterns
    for index, pattern in enumerate(whitelist):
        found += [Caution(((index, pattern.text),), (gap,), message) for gap, message in _gaps(pattern, whitelist)]
        found += [Caution(((index, pattern.text),), (kind,), message) for kind, message in misread(pattern)]
        if pattern.negative:
            continue
        if pattern.key is None:
            found += _of_wildcard(index, pattern, whitelist)
            continue
        name = pattern.key.rpartition("/")[2]
        kinds = tuple(sorted(kinds_of(name), key=list(Kind).index))
        if not kinds or (pattern.fixed_arguments and not _takes_orders(name, pattern)):
            continue
        if kinds[0] in (Kind.LOADS, Kind.CODE):
            kinds = kinds[:1]  # who runs code of their own does the rest with it
        alike.setdefault(kinds, []).append((index, pattern.text))
    for kinds, entries in alike.items():
        each = "each " if len(entries) > 1 else ""
        words = "; ".join(_WORDS[kind] for kind in kinds)
        found.append(Caution(tuple(entries), kinds, f"{each}{words}; {_HOLDS}"))
    found.sort(key=lambda caution: caution.entries)
    if persona.home_programs:
        entries = [(index, pattern.text) for index, pattern in enumerate(persona.home_programs)]
        found.append(Caution(tuple(entries), (Kind.CODE,), f"{_IN_HOME}; {_HOLDS}", "home_programs"))
    return found


def _takes_orders(name: str, pattern: Pattern) -> bool:
    """Whether the user of a program whose arguments are all given still says what it does."""
    plain = plain_name(name)
    options_only = all(word.startswith("-") for word in shlex.split(pattern.text)[1:])
    return plain in INTERACTIVE or (plain in PROMPTS and options_only)


def _of_wildcard(index: int, pattern: Pattern, whitelist: Sequence[Pattern]) -> Iterable[Caution]:
    """One warning, if any program that is known for something matches."""
    gone = [other for other in whitelist if other.negative and not other.looks_at_arguments]
    allowed = {
        name: min(kinds, key=list(Kind).index)
        for name, kinds in PROGRAMS.items()
        if pattern.counts_for(program := _program(name)) and not any(other.is_about(program) for other in gone)
    }
    if not allowed:
        return
    parts = []
    for kind in Kind:
        names = [name for name, most in allowed.items() if most is kind]
        if names:
            more = ", ..." if len(names) > _EXAMPLES else ""
            parts.append(f"{len(names)} that {_OF_A_WILDCARD[kind]} ({', '.join(names[:_EXAMPLES])}{more})")
    folder = _FOLDER.fullmatch(pattern.text)
    of = f" of {folder[1]}" if folder else "" if pattern.text == "**" else " that it matches"
    what = f"every program{of}"
    message = f"{what}, also of packages to come, among them where installed {'; '.join(parts)}; {_HOLDS}"
    yield Caution(((index, pattern.text),), tuple(kind for kind in Kind if kind in allowed.values()), message)


def _program(name: str) -> Program:
    path = f"/usr/{'sbin' if name in IN_SBIN else 'bin'}/{name}"
    return Program(path, (name,), (path,))


# --- entries that do not say what people think ------------------------------------------------------


def _gaps(pattern: Pattern, whitelist: Sequence[Pattern]) -> Iterator[tuple[Gap, str]]:
    if pattern.key is None:
        if pattern.negative and pattern.looks_at_arguments:
            yield from _by_position("", pattern)
        return
    name = plain_name(pattern.key.rpartition("/")[2])
    if not pattern.negative:
        yield from _said_again(name, pattern)
    elif pattern.looks_at_arguments:
        yield from _by_position(name, pattern)
        yield from _of_one_spelling(name, pattern)
    else:
        yield from _of_one_name(pattern.key, whitelist)


def _is_option(word: Word) -> bool:
    return len(word.prefix) > 1 and word.prefix.startswith("-") and word.text != "--"


def _by_position(name: str, pattern: Pattern) -> Iterator[tuple[Gap, str]]:
    program, *words = pattern.words
    loose = [str(program), Wild.DEEP.value]
    for word in words:
        if word.is_many:
            continue
        if loose[-1] != Wild.DEEP.value and not loose[-1].startswith("-"):
            loose.append(Wild.DEEP.value)
        loose.append(str(word))
    loose.append(Wild.DEEP.value)
    if [str(word) for word in words] == loose[1:]:
        return
    first = next(word for word in words if not word.is_many)
    rest = f"write '!{' '.join(loose)}'"
    if not words[0].is_many and not _is_option(first):
        example = f", as in '{name} {BEFORE_COMMANDS[name]} {first}'" if name in BEFORE_COMMANDS else ""
        yield (
            Gap.POSITION,
            f"refuses only where '{first}' is the first argument; an option before it passes{example}; {rest}",
        )
    elif not words[0].is_many:
        yield (
            Gap.POSITION,
            f"refuses only where '{first}' is the first argument; another option before it passes; {rest}",
        )
    elif not words[-1].is_many:
        yield Gap.POSITION, f"refuses only where '{words[-1]}' is the last argument; more behind it pass; {rest}"
    else:
        yield Gap.POSITION, f"refuses only where its words follow each other; an option between them passes; {rest}"


def _of_one_spelling(name: str, pattern: Pattern) -> Iterator[tuple[Gap, str]]:
    program = str(pattern.words[0])
    for word in pattern.words[1:]:
        if not _is_option(word) or (word.tokens[-1] in (Wild.STAR, Wild.DEEP) and "=" not in word.text):
            continue
        if word.prefix.startswith("--"):
            option = word.prefix.partition("=")[0]
            yield (
                Gap.SPELLING,
                f"refuses '{option}' only as '{word}': its value with or without '=', and a short or a "
                f"shortened form pass; write '!{program} ** {option}* **', and one for each other form",
            )
            return
        if len(word.text) == 2 and word.is_literal:
            long = LONG_FORMS.get((name, word.text))
            other = f"'{long}=X'" if long else "its long form, if it has one,"
            also = f" and '!{program} ** {long}* **'" if long else ""
            yield (
                Gap.SPELLING,
                f"refuses '{word}' only as a word of its own; '{word}X' and {other} pass; "
                f"write '!{program} ** {word}* **'{also}",
            )
            return


def _of_one_name(key: str, whitelist: Sequence[Pattern]) -> Iterator[tuple[Gap, str]]:
    left = [other for other in siblings(key.rpartition("/")[2]) if _allows(whitelist, _program(other))]
    if left and not key.startswith("/"):
        yield (
            Gap.OTHER_NAMES,
            f"refuses only what is called '{key}'; on Debian it is one file with others that stay allowed: "
            f"{listed(left)}; carve those out, too, that do the same",
        )


def _allows(whitelist: Sequence[Pattern], program: Program) -> bool:
    about = [pattern for pattern in whitelist if pattern.counts_for(program)]
    return any(not pattern.negative for pattern in about) and not any(
        pattern.negative and not pattern.looks_at_arguments for pattern in about
    )


def _said_again(name: str, pattern: Pattern) -> Iterator[tuple[Gap, str]]:
    words = pattern.words[1:]
    ends = next((index for index, word in enumerate(words) if word.text == "--" and word.is_literal), len(words))
    words = words[:ends]  # programs read no option after '--'
    if not any(word.is_many for word in words) or name in PROMPTS:
        return
    for word, following in zip(words, (*words[1:], None), strict=True):
        if not _is_option(word):
            continue
        option, joined, value = word.text.partition("=")
        if word.prefix.startswith("--") and joined and value.strip("*"):
            held, forms = value, f"'{option} X'"
        elif (
            len(word.text) == 2
            and following is not None
            and not (following.is_any or following.is_many or _is_option(following))
        ):
            long = LONG_FORMS.get((name, word.text))
            held, forms = str(following), f"'{option}X'" + (f", '{long}=X'" if long else "")
        else:
            continue
        yield (
            Gap.SAID_AGAIN,
            f"does not hold its user to '{held}': '**' lets them give {option} once more ({forms}), and most programs "
            "take the last; name the other arguments, or let network rules hold them",
        )
        return
