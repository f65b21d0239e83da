"""``persona``: what applies to me, what may I run, what would happen and why.

Exit codes: 0 yes, 1 it would be denied, 2 usage, 3 the agent cannot be reached or has no answer (to ``list``,
``explain`` and ``denials`` of who is in no gated session), 4 a trial could not be set up; ``try`` otherwise has
the exit code of what it ran.
"""

import argparse
import json
import os
import shutil
import sys
from typing import Any

from persona.answers import iso, local, refusal
from persona.shown import amount, line, word
from persona.version import VERSION
from persona_guest.shell.client import SOCKET, AgentError, Client

_ALWAYS = {  # why an agent lets a session start something by itself
    "login_shell": "it is the login shell of this session",
    "machinery": "it is machinery of the session (gate.plumbing of guest.toml), or persona itself",
    "service": "it is started by the service that opened this session",
}

_DOCUMENTS = (".yaml", ".yml", ".json")


def main(argv: list[str] | None = None, socket: str = SOCKET) -> int:
    """The command line; returns the exit code.  ``socket`` is the agent's."""
    words = sys.argv[1:] if argv is None else argv
    command: list[str] = []
    if words[:1] == ["try"]:
        words, command = _parted(words)
    arguments = _parser(socket).parse_args(words)
    arguments.trial_command = command
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except AgentError as error:
        if arguments.json:
            print(refusal(error.code, error.message))
        else:
            _complain(error.message)
        return 3
    except BrokenPipeError:  # whoever read it has read enough; what is left must not fail at the exit again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def _parted(words: list[str]) -> tuple[list[str], list[str]]:
    """``try`` with its options and FILEs, and the command, which begins after ``--`` or with the first other word.

    What belongs to the command keeps its options.  The first word is a FILE, whatever it is called.
    """
    files = 0
    for index, text in enumerate(words[1:], 1):
        if text == "--":
            return words[:index], words[index + 1 :]
        if text.startswith("-") and text != "-":
            continue
        if files and not _is_file(text):
            return words[:index], words[index:]
        files += 1
    return words, []


def _is_file(text: str) -> bool:
    """Whether a word behind the first FILE is one too: a directory, or called or looking like a document."""
    if text.endswith(_DOCUMENTS) or os.path.isdir(text):
        return True
    return os.path.isfile(text) and not os.access(text, os.X_OK)


def _say(text: str) -> None:
    """One line; what does not print in names that users or documents chose is escaped."""
    print(line(text).encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8"))


def _complain(text: str) -> None:
    print(f"persona: {line(text)}", file=sys.stderr)


def _parser(socket: str = SOCKET) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="the answer as one line of JSON")
    common.add_argument("--socket", default=socket, help=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(prog="persona", description="which persona applies to me, and what it allows")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("status", _status, "persona, limits, lease and mode of this session"),
        ("list", _list, "what I may run, like sudo -l"),
        ("denials", _denials, "what was denied to me lately on this machine, why, and what would help"),
        ("greeting", _greeting, "the line shown at an interactive login"),
    ):
        commands.add_parser(name, help=text, description=text, parents=[common]).set_defaults(run=run)
    text = "what would happen to a command, and why; runs nothing"
    explain = commands.add_parser("explain", help=text, description=text, parents=[common])
    explain.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help="a command and its arguments")
    explain.set_defaults(run=_explain)
    text = "a shell or command gated by the personas of FILES: no VM, no root"
    usage = "persona try [-h] [--quiet] FILE [FILE ...] [[--] CMD ...]"
    trial = commands.add_parser("try", help=text, description=text, usage=usage)
    trial.add_argument("files", nargs="+", metavar="FILE", help="persona and policy files or directories")
    trial.add_argument("--quiet", "-q", action="store_true", help="do not say what is gated")
    trial.set_defaults(run=_try, json=False)
    return parser


def _status(arguments: argparse.Namespace) -> int:
    with Client(arguments.socket) as client:
        status: dict[str, Any] = client.call("status")
    if arguments.json:
        if records := status.get("records"):
            records["oldest_at"] = None if records["oldest_at"] is None else iso(records["oldest_at"])
        print(json.dumps(status))
        return 0
    from persona_guest.shell.bars import place_lines  # half of what a status takes, and --json needs none

    for label, value in _status_lines(status):
        _say(f"{label + ':':<11}{value}")
    for row in place_lines(status["places"], bars=sys.stdout.isatty()):
        _say(row)
    return 0


def _status_lines(status: dict[str, Any]) -> list[tuple[str, str]]:
    persona = status["persona"]
    name = f"{persona['name']} v{persona['version']} (policy {status['policy']})" if persona else "none right now"
    if not status["gated"]:
        name = "none: this session is not gated"
    layers = [layer for layer, active in status["layers"].items() if active]
    # the look after the start is what there is where the kernel has no last word: it is not missed there
    missing = [] if status["layers"]["bpf"] else [f"bpf, {status['kernel']['why_not']}"]
    if missing and status["layers"].get("landlock") is False:
        missing.append("landlock, not in this kernel")
    lease = f"{status['lease_s']:.0f} s" if status["lease_s"] else "none"
    lines = [
        ("persona", name),
        ("user", f"{status['user']} on {status['vm']}"),
        ("mode", status["mode"] + ("" if status["mode"] == "enforce" else ": recorded, nothing is stopped")),
        ("session", status["session"] or "-"),
        ("lease", lease),
        ("limits", _limits(status["limits"])),
        ("network", ", ".join(status["network"]) or "-"),
        ("layers", ", ".join(layers) + (f" (not active: {', '.join(missing)})" if missing else "")),
        ("broker", f"{status['broker']}, generation {status['generation']}"),
    ]
    if status.get("records") is not None:  # root's to know; an agent of 0.1.0 does not tell
        lines.append(("records", _records(status["records"])))
    if not status["standby"]:
        lines.append(("standby", "not there: nobody would answer if the agent were stopped"))
    return (
        lines
        if status["gated"]
        else [
            line for line in lines if line[0] in ("persona", "user", "mode", "layers", "broker", "records", "standby")
        ]
    )


def _records(records: dict[str, Any]) -> str:
    """How many wait for the broker, and what is wrong with that."""
    said = [f"{amount(records['waiting'])} of {amount(records['bound'])} wait for the broker"]
    if records["oldest_at"] is not None:
        said.append(f"the oldest from {local(records['oldest_at'])}")
    said += [f"{count} lost ({why})" for why, count in records["lost"].items()]
    said += [f"not on disk: {records['not_on_disk']}"] if records["not_on_disk"] else []
    said += [f"set aside: {', '.join(records['aside'])}"] if records["aside"] else []
    return ", ".join(said)


def _limits(limits: dict[str, Any]) -> str:
    flat = {**limits, **limits.get("disk_io", {})}
    flat.pop("disk_io", None)
    return ", ".join(f"{key} {value}" for key, value in flat.items()) or "-"


def _list(arguments: argparse.Namespace) -> int:
    with Client(arguments.socket) as client:
        answer: dict[str, Any] = client.call("list")
    if arguments.json:
        print(json.dumps(answer))
        return 0
    if not answer["entries"]:
        _say("no policy is for you on this machine; ask its operator for one")
    for entry in answer["entries"]:
        persona = entry["persona"] or {}
        state = "applies now" if entry["holds"] else f"not now, {entry['reason']}: {entry['detail']}".rstrip(": ")
        _say(f"{persona.get('name', '(missing)')} v{entry['version']}, policy {entry['policy']}: {state}")
        whitelist, sets = persona.get("command_whitelist", []), entry.get("sets") or {}  # of a newer broker
        of_sets = {pattern for patterns in sets.values() for pattern in patterns}
        own = [pattern for pattern in whitelist if pattern not in of_sets]
        if own or not sets:
            _say_wrapped(own)
        for name, patterns in sets.items():
            _say_wrapped([f"@{name}: {patterns[0]}", *patterns[1:]])
        for pattern in persona.get("home_programs", []):
            _say(f"    in your home: {pattern}")
        if entry["commands"] != ["**"]:
            _say(f"    only for: {', '.join(entry['commands'])}")
    return 0


def _say_wrapped(patterns: list[str]) -> None:
    width = max(20, shutil.get_terminal_size().columns - 4)
    row = ""
    for pattern in patterns:
        if row and len(row) + len(pattern) + 2 > width:
            _say(f"    {row}")
            row = ""
        row += (", " if row else "") + pattern
    _say(f"    {row or '(nothing)'}")


_BECAME = {  # of an event that is no plain denial
    "stopped": "stopped by the kernel",
    "killed": "killed",
    "frozen": "frozen",
    "limit": "ran into a limit",
    "admission": "refused",
}


def _denials(arguments: argparse.Namespace) -> int:
    with Client(arguments.socket) as client:
        answer: dict[str, Any] = client.call("denials")
    if arguments.json:
        items = [{**one, "at": iso(one["at"]), "first_at": iso(one["first_at"])} for one in answer["items"]]
        print(json.dumps({**answer, "items": items}))
        return 0
    if not answer["items"]:
        _say("nothing was denied to you lately on this machine")
    for one in answer["items"]:
        under = f" under persona {one['persona']}" if one["persona"] else ""
        under += _by_policy(one) if one["policy"] else ""
        times = f", {one['count']} times since {local(one['first_at'])}" if one["count"] > 1 else ""
        what = word(one["program"]) if one["program"] else one["command"]
        what = f"{what}: " if what else ""
        _say(f"{local(one['at'])}  {what}{_BECAME.get(one['event'], 'denied')}, {one['reason']}{under}{times}")
        if one["program"] and one["command"]:
            _say(f"    command: {one['command']}")
        if one["help"]:
            _say(f"    {one['help']}")
    return 0


def _greeting(arguments: argparse.Namespace) -> int:
    with Client(arguments.socket) as client:
        answer: dict[str, Any] = client.call("greeting")
    if arguments.json:
        print(json.dumps(answer))
    elif answer["greeting"]:
        _say(answer["greeting"])
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    command = [word for index, word in enumerate(arguments.command) if index or word != "--"]
    if not command:
        _complain("explain: which command?")
        return 2
    path = command[0] if "/" in command[0] else shutil.which(command[0])
    if path is None:
        from persona.program_facts import BUILTINS  # only who errs pays for it

        why = "the shell does it itself, nothing is decided" if command[0] in BUILTINS else "not found in PATH"
        _complain(f"{word(command[0])}: {why}")
        return 2
    try:
        program = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        _complain(f"{word(path)}: {error.strerror}")
        return 2
    with Client(arguments.socket) as client:
        answer: dict[str, Any] = client.call(
            "explain", fd=program, argv=command, path=os.path.abspath(path), cwd=os.getcwd()
        )
    decision, file = answer["decision"], answer["program"]
    what = word(command[0])
    if os.path.basename(command[0]) not in file["names"] and os.path.abspath(path) != file["path"]:
        what += f" ({word(file['path'])})"  # the file that it is, where its name does not say
    if arguments.json:
        print(json.dumps(answer))
    elif answer.get("always"):
        _say(f"{what}: would run whatever the personas say: {_ALWAYS.get(answer['always'], answer['always'])}")
    elif decision["decision"] == "granted":
        persona = decision["persona"]
        _say(f"{what}: would run under {persona['name']} v{persona['version']}{_by_policy(decision)}")
    else:
        under = f" under {decision['persona']}{_by_policy(decision)}" if decision["persona"] else ""
        _say(f"{what}: would be denied, {decision['reason']}{under}: {decision['help']}")
    return 0 if decision["decision"] == "granted" else 1


def _by_policy(one: dict[str, Any]) -> str:
    """The policy of a decision or of a denial, as in the line of a denial; an agent of before says no origin."""
    policy, origin = one["policy"], one.get("policy_origin")
    return f", policy {policy} ({line(origin)})" if origin else f" (policy {policy})"


def _try(arguments: argparse.Namespace) -> int:
    from persona_guest.shell import trial  # only a trial pays for it

    return trial.run(arguments.files, arguments.trial_command, quiet=arguments.quiet)


if __name__ == "__main__":
    sys.exit(main())
