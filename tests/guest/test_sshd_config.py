"""What is said of a real sshd's settings."""

import subprocess
from pathlib import Path

import pytest
from persona_guest.agent.sshd_config import advice

SSHD = Path("/usr/sbin/sshd")
pytestmark = pytest.mark.root


@pytest.fixture
def ssh(tmp_path: Path) -> Path:
    Path("/run/sshd").mkdir(exist_ok=True)  # where its service runs, systemd has made it
    (tmp_path / "sshd_config.d").mkdir()
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (tmp_path / "sshd_config").write_text(f"Include {tmp_path}/sshd_config.d/*.conf\nHostKey {key}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("Subsystem sftp internal-sftp -l INFO", "sshd -T: internal-sftp"),
        ("  forcecommand=internal-sftp", "sshd -T: internal-sftp"),
        ("PermitUserEnvironment yes", "sshd -T: PermitUserEnvironment"),
        ("PermitUserEnvironment LANG,LC_*", "sshd -T: PermitUserEnvironment"),
        ("PermitUserEnvironment no\nPermitUserEnvironment yes", None),  # the first one wins
        ("#Subsystem sftp internal-sftp", None),
        ("Subsystem sftp /usr/lib/openssh/sftp-server", None),
        ("Match User alice\n  ForceCommand internal-sftp", "x.conf:3: internal-sftp"),
        ('match=group sftp\n\tforceCommand "internal-sftp"', "x.conf:3: internal-sftp"),
        ("Match User alice\n  ForceCommand /bin/true", None),
        ("Match User alice\n  X11Forwarding no\nMatch all # again\n  PermitUserEnvironment no", None),
    ],
)
def test_what_sshd_lets_past_the_gate_is_said(ssh: Path, text: str, where: str | None) -> None:
    assert advice(ssh, SSHD) == []
    (ssh / "sshd_config.d" / "x.conf").write_text(f"UsePAM yes\n{text}\n")
    found = advice(ssh, SSHD)
    assert len(found) == (where is not None)
    assert all(str(where) in line for line in found)


def test_a_file_anywhere_that_is_included_counts(ssh: Path) -> None:
    (ssh / "elsewhere").write_text("Subsystem sftp internal-sftp\n")
    (ssh / "sshd_config.d" / "x.conf").write_text(f"Include {ssh}/elsewhere\n")
    (found,) = advice(ssh, SSHD)
    assert found.startswith("sshd -T: internal-sftp starts no program")


def test_settings_that_sshd_refuses_are_said_to_be_unknown(ssh: Path) -> None:
    with (ssh / "sshd_config").open("a") as file:
        file.write("NoSuchWord yes\nMatch User a\nForceCommand internal-sftp\n")
    unknown, known = advice(ssh, SSHD)
    assert unknown.startswith("what sshd does for everybody was not looked at: ")
    assert "which root can run" in unknown
    assert known.startswith(f"{ssh}/sshd_config:5: internal-sftp")


def test_where_there_is_no_sshd_there_is_nothing_to_say(ssh: Path) -> None:
    (ssh / "sshd_config.d" / "x.conf").write_text("Match User a\nForceCommand internal-sftp\n")
    assert advice(ssh, ssh / "none") == []
