"""``persona-agent``: the root daemon that answers the gate; and what an operator asks of it.

Exit codes: 0 ended as asked, 1 could not start, 2 usage.

A service says that it starts before it loads the rest of itself: loading takes most of a start, on a slow machine
longer than anybody would wait for an agent that is not heard of.  What stands at the top here is loaded before.
"""

import argparse
import sys
from pathlib import Path

from persona.problems import Fault, PersonaError
from persona.version import VERSION
from persona_guest import settings as configuration
from persona_guest.settings import Settings
from persona_guest.system import runtime_dir
from persona_guest.system.start_progress import Start

CONFIG = "/etc/persona/guest.toml"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    start = _begin() if argv in ([], ["--debug"]) else None  # as a service is started; all else is in no hurry
    from persona_guest.agent.answers import refused  # not before; likewise what each command needs

    arguments = _parser().parse_args(argv)
    if arguments.config != CONFIG and not Path(arguments.config).exists():
        return refused(Fault.NOT_FOUND, f"{arguments.config}: No such file or directory", as_json=arguments.json)
    try:
        settings = configuration.load(Path(arguments.config))
    except PersonaError as error:
        if arguments.command != "release" or arguments.config != CONFIG:
            return refused(error.code, error.message, as_json=arguments.json)
        # the package goes: what is bound must not stay for want of a file that can be read
        print(f"persona-agent: {error.message}; the default paths are taken", file=sys.stderr)
        settings = Settings()
    if arguments.command == "run":
        from persona_guest.agent import lifecycle

        return lifecycle.run(settings, start, debug=arguments.debug)
    if arguments.command.endswith("-kernel"):
        from persona_guest.agent import kernel_commands

        return kernel_commands.run(arguments.command, settings, as_json=arguments.json)
    from persona_guest.agent import admin

    if arguments.command == "check-config":
        return admin.check_config(arguments.config, settings, as_json=arguments.json)
    if arguments.command == "release":
        return admin.release(settings, as_json=arguments.json)
    return admin.plan(settings, as_json=arguments.json)


def _begin() -> Start | None:
    """``None`` where it cannot begin: the agent then finds out why, and says so."""
    try:
        runtime = Path(configuration.load(Path(CONFIG)).paths.runtime_dir)
        return Start(runtime_dir.prepare(runtime))
    except (PersonaError, OSError):
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="persona-agent", description="answers the exec gate of this machine")
    parser.add_argument("--config", default=CONFIG, help=f"settings, TOML (default {CONFIG})")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    parser.add_argument(
        "command",
        nargs="?",
        choices=["run", "check-config", "release", "plan", "load-kernel", "unload-kernel"],
        default="run",
        help="run: answer until SIGTERM, as without a command; check-config: what is wrong with the settings; "
        "release: let every gated session go on ungated and unbound, before the package is removed; "
        "plan: what would be changed now so that what is found is what should be; "
        "load-kernel: put the kernel layer in place or replace it; unload-kernel: take it away",
    )
    parser.add_argument("--json", action="store_true", help="the answer as one line of JSON; run has none")
    parser.add_argument("--debug", action="store_true", help="run: log each plan as data, before it is applied")
    return parser


if __name__ == "__main__":
    sys.exit(main())
