"""What in sshd's settings goes past the gate without starting a program.  Reads them as text; changes nothing."""

import re
from pathlib import Path

_SFTP = re.compile(rb"^\s*(subsystem\s+\S+|forcecommand)\s+internal-sftp\b", re.IGNORECASE | re.MULTILINE)
_ENVIRONMENT = re.compile(rb"^\s*permituserenvironment\s+(?!no\b)\S", re.IGNORECASE | re.MULTILINE)


def advice(ssh: Path = Path("/etc/ssh")) -> list[str]:
    """One sentence for each thing found in sshd_config and sshd_config.d; files that cannot be read say nothing."""
    found = []
    for file in (ssh / "sshd_config", *sorted(ssh.glob("sshd_config.d/*.conf"))):
        try:
            text = file.read_bytes()
        except OSError:
            continue
        if _SFTP.search(text):
            found.append(
                f"{file}: internal-sftp starts no program, so no persona decides about it; "
                "use /usr/lib/openssh/sftp-server"
            )
        if _ENVIRONMENT.search(text):
            found.append(
                f"{file}: PermitUserEnvironment lets users set LD_PRELOAD before persona-shell runs; "
                "set it to no where PAM does not put up the gate"
            )
    return found
