#!/usr/bin/env python3
"""Writes the pages of docs/reference that the code can write: routes, socket operations, commands and metrics.

``tests/test_reference.py`` fails where a page is older than the code; run this then.  The other pages there are
written by hand, and the same tests compare them with the code.
"""

import argparse
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "broker", "guest")]

from persona_broker import metrics  # noqa: E402
from persona_broker.serve import app  # noqa: E402
from persona_broker.settings import Settings  # noqa: E402
from persona_guest.agent.requests import Users  # noqa: E402
from persona_guest.core.pam_protocol import Op, PamVerdict  # noqa: E402
from persona_guest.ipc.users import Call  # noqa: E402

from persona.problems import Fault, PersonaError  # noqa: E402
from scripts.completions import COMMANDS, parser_of  # noqa: E402

FOLDER = ROOT / "docs" / "reference"
_MADE = "<!-- made by scripts/reference.py from the code: change that, not this -->\n"


def summary(function: Callable[..., object]) -> str:
    """The first sentence of a docstring, as Markdown."""
    text = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    return text.replace("``", "`")


def table(heads: str, rows: Iterable[tuple[str, ...]]) -> str:
    """A table of Markdown; ``heads`` are words with ``|`` between them."""
    names = heads.split("|")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# --- routes -------------------------------------------------------------------------------------------

Route = tuple[str, str]  # method, path as docs/protocol.md writes it


@cache
def routes() -> dict[Route, tuple[str, str, str]]:
    """Each route: which process answers it, who may call, and what it does.

    Who may call is found by calling without a token.
    """
    found: dict[Route, tuple[str, str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(db=str(Path(folder) / "broker.db"))
        for process, blueprints in (("api", app.API), ("events", app.STREAMS)):
            flask = app.base(settings, blueprints)
            client = flask.test_client()
            for rule in flask.url_map.iter_rules():
                path = re.sub(r"<(?:int:)?(\w+)>", lambda match: _VARIABLES[match[1]], rule.rule)
                for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
                    if (method, path) in found:
                        process = "both"
                    example = re.sub(r"<(?:int:)?\w+>", "1", rule.rule)
                    who = "guests" if client.open(example, method=method).status_code == 401 else "anybody"
                    found[method, path] = process, who, summary(flask.view_functions[rule.endpoint])
    return found


_VARIABLES = {"ident": "ID", "name": "NAME", "version": "N"}


def http() -> str:
    """The page of routes."""
    rows = (
        (f"`{method} {path}`", *rest)
        for (method, path), rest in sorted(routes().items(), key=lambda item: item[0][::-1])
    )
    return f"""{_MADE}
# The broker's HTTP routes

Guests call with the token of their VM (`Authorization: Bearer TOKEN`) and may speak of that VM alone; without a token
the answer is `unauthenticated`. "api" is the process behind `bind` of [broker.toml](settings.md#brokertoml), "events"
the one behind `events_bind`. [Protocols](../protocol.md) has bodies and answers, [problem codes](problems.md) has the
errors.

{table("call|answered by|who may call|what it does", rows)}"""


# --- sockets ------------------------------------------------------------------------------------------

PAM_OPS: Mapping[Op, str] = {
    Op.ACCOUNT: "May this user log in?",
    Op.OPEN: "A session opens: gate it, let it pass, or refuse it.",
    Op.LISTENER: "Here is the seccomp listener of the session that OPEN began.",
    Op.PRESENT: "The kernel has a listener on this process already: is that a session that you gate?",
    Op.GROUPS: "More groups of the user whom the ACCOUNT or OPEN that follows is about; has no answer.",
}
VERDICTS: Mapping[PamVerdict, str] = {
    PamVerdict.PASS: "Not gated: succeed.",
    PamVerdict.GATE: "Install the filter that comes with this, then send LISTENER.",
    PamVerdict.DENY: "Refuse, and show the message.",
    PamVerdict.DONE: "Succeed: the answer to LISTENER and PRESENT.",
}
STANDBY: Mapping[str, tuple[str, str]] = {
    "take": ("agent", "I start: send all listeners that you keep, and answer no more."),
    "here": ("agent", "I am ready and answer from now on."),
    "keep": ("agent", "Keep these listeners, whose descriptors come along."),
    "drop": ("agent", "These are over."),
    "kept": ("standby", "Listeners that it kept, with their descriptors; after `take`."),
    "end": ("standby", "Those were all."),
}


def operations() -> Iterator[tuple[str, str, str, str]]:
    """Each operation of agent.sock: who may call it, its fields, and what it does."""
    users = Users(**{name: cast(Any, None) for name in inspect.signature(Users).parameters})  # none is asked
    for name, handler in users._ops.items():
        fields = re.search(r"call\.only\(([^)]*)\)", inspect.getsource(handler))
        said = (
            ", ".join(f"`{field.strip().strip(chr(34))}`" for field in fields[1].split(",") if field) if fields else "?"
        )
        yield f"`{name}`", _who(users, name), said, summary(handler)


def _who(users: Users, name: str) -> str:
    try:
        users.handle(Call(1, 1000, 1000, name, {}, ()), lambda _answer: None)
    except PersonaError as error:
        return "root" if error.code is Fault.UNAUTHENTICATED else "anybody"
    except AttributeError:  # it went on to ask the parts that there are none of here
        return "anybody"
    return "anybody"


def sockets() -> str:
    """The page of socket operations."""
    pam = [(f"{op.value}", op.name, PAM_OPS[op]) for op in Op]
    verdicts = [(f"{verdict.value}", verdict.name, VERDICTS[verdict]) for verdict in PamVerdict]
    standby = [(f"`{word}`", *rest) for word, rest in STANDBY.items()]
    return f"""{_MADE}
# The agent's sockets

All are `SOCK_SEQPACKET` in `/run/persona`; [protocols](../protocol.md) has their packets, bounds and deadlines.

## agent.sock

What `persona` and `persona-shell` ask, in JSON: `{{"op": NAME, FIELD: …}}`. Anybody may connect. The kernel says who
asks and from which session: users are told of their own session only. Outside of a session the answer is
`session_unknown`, or says that there is none. Refusals have a [problem code](problems.md).

{table("op|who may call|fields|what it does", operations())}
## pam.sock

What `pam_persona.so` asks, in binary packets. Root alone may connect.

{table("number|op|what it says", pam)}
The agent answers each but GROUPS with one of these:

{table("number|verdict|what the module does", verdicts)}
## standby.sock

What agent and `persona-standby` say to each other. Root alone may connect.

{table("word|said by|meaning", standby)}
## installer.sock

What the agent asks of `persona-installer`: one list of dependencies a connection, answered by progress and one
outcome. Root alone may connect. It has no operations.
"""


# --- commands -----------------------------------------------------------------------------------------


def commands() -> str:
    """The page of commands: what ``--help`` says, in one form for all versions of Python."""
    parts = [
        f"""{_MADE}
# Commands

What `--help` says. [Commands, for people and for programs](../cli.md) has exit codes and `--json`. The options of
`persona` and `persona-broker` themselves go before the command.
"""
    ]
    for name in COMMANDS:
        for path, parser, text in _each(name, parser_of(name), parser_of(name).description or ""):
            if path != name and any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
                continue  # a noun: its commands follow
            level = "##" if path == name else "###"
            parts.append(f"{level} {path}\n\n{_sentence(text)}\n\n    {_synopsis(path, parser)}\n")
            if rows := list(_arguments(parser)):
                parts.append(table("argument|meaning", rows))
    return "\n".join(parts)


def _each(path: str, parser: argparse.ArgumentParser, text: str) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    yield path, parser, text
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, below in action.choices.items():
                yield from _each(f"{path} {name}", below, helps.get(name, ""))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _synopsis(path: str, parser: argparse.ArgumentParser) -> str:
    if parser.usage:
        return parser.usage.replace("[-h] ", "")
    words = [path]
    for action in _shown(parser):
        if action.option_strings:
            word = _option(action)
            words.append(word if action.required else f"[{word}]")
        else:
            words.append(_value(action))
    return " ".join(words)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    formatter = parser._get_formatter()
    for action in _shown(parser):
        if isinstance(action, argparse._SubParsersAction):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{_value(action)}`"
        if action.option_strings and action.nargs != 0:
            names += f" `{_metavar(action)}`"
        text = formatter._expand_help(action) if action.help else ""
        if isinstance(action, argparse._VersionAction):  # argparse's own words may change
            text = "says which version this is"
        yield names, text


def _shown(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS:
            yield action


def _option(action: argparse.Action) -> str:
    name = next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])
    return name if action.nargs == 0 else f"{name} {_metavar(action)}"


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper()


def _value(action: argparse.Action) -> str:
    name = _metavar(action) if action.metavar or action.choices else action.dest.upper()
    if isinstance(action, argparse._SubParsersAction):
        return "COMMAND"
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} ...", "...": f"{name} ..."}.get(
        str(action.nargs), name
    )


# --- metrics ------------------------------------------------------------------------------------------

LABELS: Mapping[str, tuple[str, ...]] = {  # of those that have any
    "documents_unreadable": ("kind",),
    "load_percent": ("metric",),
    "host_sample_age_seconds": ("host",),
    "host_load_percent": ("host", "metric"),
    "coverage_gaps": ("lack",),
    "health_report_age_seconds": ("vm",),
    "vm_layer_active": ("vm", "layer"),
    "vm_conditions_unmet": ("vm",),
    "denials_surge": ("reason",),
    "audit_sink_failing": ("sink",),
    "audit_sink_waiting": ("sink",),
    "decisions_total": ("outcome",),
    "admissions_total": ("outcome",),
    "decision_seconds": ("le",),
}


def numbers() -> str:
    """The page of metrics."""
    rows = (
        (f"`persona_broker_{name}`", kind, ", ".join(f"`{label}`" for label in LABELS.get(name, ())), text)
        for name, (kind, text) in metrics.METRICS.items()
    )
    return f"""{_MADE}
# Metrics

The broker's `GET /metrics`, on both ports, in Prometheus text; it needs no token. A guest has no metrics of its own:
what it reports is here. A series is not there while nothing was counted, sampled or reported. The `outcome` of a
decision is `granted` or a [reason](problems.md), of an admission `admitted` or `refused`.

{table("metric|type|labels|meaning", rows)}"""


PAGES: Mapping[str, Callable[[], str]] = {
    "http.md": http,
    "sockets.md": sockets,
    "commands.md": commands,
    "metrics.md": numbers,
}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (FOLDER / page).write_text(text())
