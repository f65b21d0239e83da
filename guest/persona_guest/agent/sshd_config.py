"""What in sshd's settings goes past the gate without starting a program.  Changes nothing.

``sshd -T`` says what holds for everybody, with each Include and whatever wins.  It does not show what is in a Match
block: sshd_config and the files of sshd_config.d are read as text for those, and no other file.
"""

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

_SSHD = Path("/usr/sbin/sshd")
_LIMIT_S = 10.0
_IS = r"[\s=]+\"?"  # between a word and its value, as sshd takes it
_SFTP = re.compile(rf"\s*(subsystem{_IS}\S+|forcecommand){_IS}internal-sftp\b", re.IGNORECASE)
_ENVIRONMENT = re.compile(rf"\s*permituserenvironment{_IS}(?!no\b)\w", re.IGNORECASE)
_MATCH = re.compile(rf"\s*match{_IS}(?P<all>all\s*(#.*)?$)?", re.IGNORECASE)


def advice(ssh: Path = Path("/etc/ssh"), sshd: Path = _SSHD) -> list[str]:
    """Returns a sentence for each setting that goes past the gate, and one where sshd does not answer.

    It is empty where sshd is not installed.
    """
    if not sshd.exists():
        return []
    found: list[str] = []
    try:
        for line in _for_everybody(ssh / "sshd_config", sshd):
            found += _notes("sshd -T", line)
    except (OSError, subprocess.SubprocessError) as error:
        found.append(f"what sshd does for everybody was not looked at: {error}")
    for file in (ssh / "sshd_config", *sorted(ssh.glob("sshd_config.d/*.conf"))):
        for number, line in _in_match_blocks(file):
            found += _notes(f"{file}:{number}", line)
    return found


def _for_everybody(config: Path, sshd: Path) -> Sequence[str]:
    """Raises ``OSError``, ``subprocess.SubprocessError``: with what sshd says, where it says something."""
    command = [str(sshd), "-T", "-f", str(config)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_LIMIT_S,
        check=False,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise subprocess.SubprocessError(f"'{' '.join(command)}', which root can run: {why[:300]}")
    return done.stdout.splitlines()


def _in_match_blocks(file: Path) -> Iterator[tuple[int, str]]:
    """The lines, with their numbers, that ``sshd -T`` does not show; none of a file that cannot be read."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return
    within = False
    for number, line in enumerate(lines, 1):
        if match := _MATCH.match(line):
            within = match["all"] is None
        elif within:
            yield number, line


def _notes(where: str, line: str) -> Iterator[str]:
    if _SFTP.match(line):
        yield (
            f"{where}: internal-sftp starts no program, so no persona decides about it; "
            "use /usr/lib/openssh/sftp-server"
        )
    if _ENVIRONMENT.match(line):
        yield (
            f"{where}: PermitUserEnvironment lets users set LD_PRELOAD before persona-shell runs; "
            "set it to no where PAM does not put up the gate"
        )
