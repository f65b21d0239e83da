#!/usr/bin/env python3
"""Writes packaging/completions: what bash completes of each command, made from the parsers that read them.

``tests/test_completions.py`` fails where a file there is older than its parser; run this then.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "packaging" / "completions"
COMMANDS = ("persona", "persona-agent", "persona-broker", "persona-host")


@dataclass
class Command:
    """A command or one below it: its words, and what the value of each of its options may be.

    ``values``: some words, ``None`` for a file, ``()`` for what nobody can guess.  ``runs``: a command line follows.
    """

    path: str
    words: list[str] = field(default_factory=list)
    values: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    files: bool = False
    runs: bool = False
    below: list["Command"] = field(default_factory=list)

    def all(self) -> Iterator["Command"]:
        """This one and all below it."""
        yield self
        for command in self.below:
            yield from command.all()


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of one of COMMANDS."""
    sys.path[:0] = [str(ROOT / folder) for folder in ("", "broker", "guest")]
    if name == "persona":
        from persona_guest.shell.cli import _parser as persona

        return persona()
    if name == "persona-agent":
        from persona_guest.__main__ import _parser as agent

        return agent()
    if name == "persona-host":
        from persona_broker.host_command import _parser as host

        return host()
    from persona_broker.__main__ import _parser as broker

    return broker()


def read(parser: argparse.ArgumentParser, path: str = "") -> Command:
    """What there is to complete."""
    found = Command(path)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found.words.append(name)
                found.below.append(read(below, f"{path} {name}"))
        elif action.help == argparse.SUPPRESS:
            continue
        elif action.option_strings:
            found.words += [word for word in action.option_strings if word.startswith("--")] or action.option_strings
            if action.nargs != 0:
                found.values |= dict.fromkeys(action.option_strings, _value(action))
        elif action.metavar == "CMD":
            found.runs = True
        elif action.choices is not None:
            found.words += map(str, action.choices)
        else:
            found.files |= _value(action) is None
    return found


def _value(action: argparse.Action) -> tuple[str, ...] | None:
    if action.choices is not None:
        return tuple(map(str, action.choices))
    if action.type is Path or action.metavar == "FILE" or action.dest in ("config", "db"):
        return None
    return ()


def script(name: str) -> str:
    """The file for one of COMMANDS."""
    function = "_" + name.replace("-", "_")
    commands = list(read(parser_of(name)).all())
    descend = " | ".join(f"'{command.path}'" for command in commands[1:])
    lines = [
        f"# bash completion of {name}, made by scripts/completions.py from its parser: change that, not this",
        "# shellcheck shell=bash",
        f"{function}() {{",
        '    local cur=${COMP_WORDS[COMP_CWORD]} path="" i kind="" value="" words=""',
        "    COMPREPLY=()",
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        '        if [[ ${COMP_WORDS[i]} == -- ]]; then',
        '            ((i + 1 == COMP_CWORD)) && mapfile -t COMPREPLY < <(compgen -c -- "$cur")',
        "            return",
        "        fi",
        '        case "$path ${COMP_WORDS[i]}" in',
    ]  # fmt: skip
    for command in commands:
        for kind, wanted in (("file", None), ("unknown", ())):
            options = [option for option, value in command.values.items() if value == wanted]
            if options:
                lines += [f"        {_either(command, options)})", f"            kind='{kind}' ;;"]
        for option, value in command.values.items():
            if value:
                lines += [
                    f"        {_either(command, [option])})",
                    f"            kind='words' value='{' '.join(value)}' ;;",
                ]
    if descend:
        lines += [
            f"        {descend})",
            '            [[ -n $kind ]] || path="$path ${COMP_WORDS[i]}"',
            "            kind= ;;",
        ]
    lines += [
        "        *) kind= ;;",
        "        esac",
        "    done",
        "    case $kind in",
        "    file) return ;;",
        '    words) mapfile -t COMPREPLY < <(compgen -W "$value" -- "$cur") ;;',
        "    unknown) compopt +o default 2>/dev/null ;;",
        "    *)",
        "        case $path in",
    ]
    for command in commands:
        lines += [f"        '{command.path}')", f"            words='{' '.join(command.words)}'"]
        if command.runs:
            lines.append('            [[ $cur == -* ]] || mapfile -t COMPREPLY < <(compgen -c -- "$cur")')
        elif not command.files:
            lines.append("            compopt +o default 2>/dev/null")
        lines.append("            ;;")
    lines += [
        "        esac",
        '        mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -W "$words" -- "$cur")',
        "        ;;",
        "    esac",
        "}",
        f"complete -o default -F {function} {name}",
    ]
    return "\n".join(lines) + "\n"


def _either(command: Command, options: list[str]) -> str:
    return " | ".join(f"'{command.path} {option}'" for option in options)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in COMMANDS:
        (FOLDER / name).write_text(script(name))
