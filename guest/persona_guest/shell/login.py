"""``persona-shell``: as login shell or ForceCommand, puts up the gate where PAM did not, then becomes the real shell.

Everything that prevents the gate refuses the login with one line and exit code 126, "found but not
executed" in sh(1); but where the agent cannot be asked, without_agent.py says who goes on all the same.
Otherwise the exit code is the real shell's, since this process becomes it.
"""

import os
import pwd
import sys

from persona_guest.session.login_shells import real_shell
from persona_guest.shell.client import SOCKET, UNREACHABLE, AgentError
from persona_guest.shell.gate import install

REFUSED = 126


def main(argv: list[str] | None = None) -> int:
    """Returns only where the login is refused."""
    arguments = sys.argv if argv is None else argv
    user = pwd.getpwuid(os.getuid())
    shell = real_shell(user.pw_name, user.pw_shell)
    command = os.environ.pop("SSH_ORIGINAL_COMMAND", None)
    rest = arguments[1:]
    if command is not None:
        rest = ["-c", command]
    interactive = not rest and os.isatty(0) and os.isatty(1)
    try:
        gated = install(SOCKET, shell)
    except AgentError as error:
        if error.code == UNREACHABLE and _is_let_in():
            return become(shell, rest, login=_is_login(arguments, command, rest))
        line = error.message if error.message.startswith("persona:") else f"persona: {error.message}"
        print(line, file=sys.stderr)
        return REFUSED
    if interactive and gated.greeting and not os.path.exists(os.path.join(user.pw_dir, ".hushlogin")):
        print(gated.greeting, flush=True)
    return become(shell, rest, login=_is_login(arguments, command, rest))


def _is_login(arguments: list[str], command: str | None, rest: list[str]) -> bool:
    return arguments[0].startswith("-") or (command is None and not rest)


def _is_let_in() -> bool:
    from persona_guest.shell.without_agent import why_let_in  # nearly every login has an agent

    return why_let_in(os.getuid(), [os.getgid(), *os.getgroups()]) is not None


def become(shell: str, rest: list[str], *, login: bool) -> int:
    """execve(2) of the real shell; a login shell's argv[0] begins with a dash (login(1)).

    Returns the code of sh(1) for a program that cannot be run: 126, or 127 where it is not there.
    """
    name = os.path.basename(shell)
    os.environ["SHELL"] = shell
    try:
        os.execv(shell, ["-" + name if login else name, *rest])
    except FileNotFoundError:
        print(f"persona: {shell}: not found", file=sys.stderr)
        return 127
    except OSError as error:
        print(f"persona: {shell}: {error.strerror}", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
