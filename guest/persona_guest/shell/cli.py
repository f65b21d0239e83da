"""``persona``: what applies to me, what may I run, what would happen and why.

Exit codes: 0 yes, 1 it would be denied, 2 usage, 3 the agent cannot be reached or has no answer (to ``list``
and ``explain`` of who is in no gated session), 4 a trial could not be set up; ``try`` otherwise has the exit
code of what it ran.
"""

import argparse
import json
import os
import shutil
import sys
from typing import Any

from persona_guest.shell.bars import place_lines
from persona_guest.shell.client import SOCKET, AgentError, Client


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    command: list[str] = []
    if words[:1] == ["try"] and "--" in words:  # what follows belongs to the command, options included
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    arguments = _parser().parse_args(words)
    arguments.trial_command = command
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except AgentError as error:
        if arguments.json:
            print(json.dumps({"ok": False, "code": error.code, "message": error.message}))
        else:
            print(f"persona: {error.message}", file=sys.stderr)
        return 3
    except BrokenPipeError:  # whoever read it has read enough; what is left must not fail at the exit again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="machine-readable output")
    common.add_argument("--socket", default=SOCKET, help=argparse.SUPPRESS)
    parser = argparse.ArgumentParser(prog="persona", description="which persona applies to me, and what it allows")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("status", _status, "persona, limits, lease and mode of this session"),
        ("list", _list, "what I may run, like sudo -l"),
        ("greeting", _greeting, "the line shown at an interactive login"),
    ):
        commands.add_parser(name, help=text, description=text, parents=[common]).set_defaults(run=run)
    text = "what would happen to a command, and why; runs nothing"
    explain = commands.add_parser("explain", help=text, description=text, parents=[common])
    explain.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    explain.set_defaults(run=_explain)
    text = "a shell or command gated by the personas of FILES: no VM, no root"
    trial = commands.add_parser("try", help=text, description=text, parents=[common])
    trial.add_argument("files", nargs="+", metavar="FILE", help="persona and policy files or directories")
    trial.add_argument("--quiet", "-q", action="store_true", help="do not say what is gated")
    trial.set_defaults(run=_try)
    return parser


def _status(arguments: argparse.Namespace) -> int:
    with Client(arguments.socket) as client:
        status: dict[str, Any] = client.call("status")
    if arguments.json:
        print(json.dumps(status))
        return 0
    for label, value in _status_lines(status):
        print(f"{label + ':':<11}{value}")
    for line in place_lines(status["places"], bars=sys.stdout.isatty()):
        print(line)
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
    if not status["standby"]:
        lines.append(("standby", "not there: nobody would answer if the agent were stopped"))
    return (
        lines
        if status["gated"]
        else [line for line in lines if line[0] in ("persona", "user", "mode", "layers", "broker", "standby")]
    )


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
    for entry in answer["entries"]:
        persona = entry["persona"] or {}
        state = "applies now" if entry["holds"] else f"not now, {entry['reason']}: {entry['detail']}".rstrip(": ")
        print(f"{persona.get('name', '(missing)')} v{entry['version']}, policy {entry['policy']}: {state}")
        width = max(20, shutil.get_terminal_size().columns - 4)
        line = ""
        for pattern in persona.get("command_whitelist", []):
            if line and len(line) + len(pattern) + 2 > width:
                print(f"    {line}")
                line = ""
            line += (", " if line else "") + pattern
        print(f"    {line or '(nothing)'}")
        if entry["commands"] != ["**"]:
            print(f"    only for: {', '.join(entry['commands'])}")
    return 0


def _greeting(arguments: argparse.Namespace) -> int:
    with Client(arguments.socket) as client:
        answer = client.call("greeting")
    if arguments.json:
        print(json.dumps(answer))
    elif answer["greeting"]:
        print(answer["greeting"])
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    command = [word for index, word in enumerate(arguments.command) if index or word != "--"]
    if not command:
        print("persona: explain: which command?", file=sys.stderr)
        return 2
    path = command[0] if "/" in command[0] else shutil.which(command[0])
    if path is None:
        print(f"persona: {command[0]}: not found in PATH", file=sys.stderr)
        return 2
    try:
        program = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        print(f"persona: {path}: {error.strerror}", file=sys.stderr)
        return 2
    with Client(arguments.socket) as client:
        answer: dict[str, Any] = client.call(
            "explain", fd=program, argv=command, path=os.path.abspath(path), cwd=os.getcwd()
        )
    decision = answer["decision"]
    if arguments.json:
        print(json.dumps(answer))
    elif decision["decision"] == "granted":
        persona = decision["persona"]
        print(f"{command[0]}: would run under {persona['name']} v{persona['version']} (policy {decision['policy']})")
    else:
        under = f" under {decision['persona']} (policy {decision['policy']})" if decision["persona"] else ""
        print(f"{command[0]}: would be denied, {decision['reason']}{under}: {decision['help']}")
    return 0 if decision["decision"] == "granted" else 1


def _try(arguments: argparse.Namespace) -> int:
    from persona_guest.shell import trial  # only a trial pays for it

    return trial.run(arguments.files, arguments.trial_command, quiet=arguments.quiet)


if __name__ == "__main__":
    sys.exit(main())
