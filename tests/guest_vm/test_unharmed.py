"""Plain work goes on as if there were no gate."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.guest_vm.login import Terminal
from tests.guest_vm.machine import Machine


def terminal_of(guest: Machine, *command: str) -> Terminal:
    return Terminal([*guest.ssh_argv("alice", "-tt"), *command])


@pytest.mark.parametrize("shell", ["bash --norc", "zsh -f"])
def test_job_control(guest: Machine, shell: str) -> None:
    terminal = terminal_of(guest, shell)
    try:
        terminal.type("PS1='READY> '\n")
        terminal.expect("READY> ")
        terminal.expect("READY> ") if "zsh" not in shell else None
        terminal.type("sleep 100\n")
        time.sleep(1.5)
        terminal.type("\x1a")  # ^Z
        terminal.expect("topped" if "bash" in shell else "suspended")
        terminal.type("jobs; bg; echo in-back$((20+1))\n")
        terminal.expect("in-back21")
        terminal.type("fg\n")
        terminal.expect("sleep 100")
        time.sleep(1)
        terminal.type("\x03")  # ^C
        time.sleep(0.5)
        terminal.type("echo code-$?-end\n")
        terminal.expect("code-130-end")
    finally:
        terminal.close()


def test_tab_completion(guest: Machine) -> None:
    terminal = terminal_of(guest)
    try:
        terminal.expect("$ ")
        terminal.type("ls -d /etc/host\t\t")
        terminal.expect("hostname")
        terminal.type("na\t\n")
        terminal.expect("hostname")
        terminal.expect("/etc/hostname")
    finally:
        terminal.close()


def copy(guest: Machine, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv = guest.ssh_argv("alice")
    options, target = argv[1:-1], argv[-1]
    options[options.index("-p")] = "-P"
    return subprocess.run(
        [program, *options, *(word.replace("HOST", target) for word in words)],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("protocol", ["-s", "-O"])
def test_scp_both_protocols(guest: Machine, tmp_path: Path, protocol: str) -> None:
    (tmp_path / "there").write_bytes(os.urandom(100_000))
    done = copy(guest, "scp", protocol, "-q", str(tmp_path / "there"), "HOST:copied")
    assert done.returncode == 0, done.stderr
    done = copy(guest, "scp", protocol, "-q", "HOST:copied", str(tmp_path / "back"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there").read_bytes() == (tmp_path / "back").read_bytes()


def test_rsync_and_git_over_ssh(guest: Machine, tmp_path: Path) -> None:
    argv = guest.ssh_argv("alice")
    ssh = " ".join(argv[:-1])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("content")
    subprocess.run(["rsync", "-a", "-e", ssh, f"{tmp_path}/a/", "alice@127.0.0.1:synced/"], check=True, timeout=60)
    assert guest.ssh("alice", "cat synced/file").out == "content"
    guest.ssh("alice", "rm -rf bare; git init -q --bare bare")
    env = {**os.environ, "GIT_SSH_COMMAND": ssh, "GIT_CONFIG_GLOBAL": "/dev/null"}
    repo = tmp_path / "repo"
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    for words in (
        ("init", "-q", "-b", "main", str(repo)),
        ("-C", str(repo), *identity, "commit", "-q", "--allow-empty", "-m", "x"),
        ("-C", str(repo), "push", "-q", "alice@127.0.0.1:bare", "main"),
        ("clone", "-q", "alice@127.0.0.1:bare", str(tmp_path / "clone"), "-b", "main"),
    ):
        subprocess.run(["git", *words], check=True, timeout=90, env=env)


def test_ansible(guest: Machine, tmp_path: Path) -> None:
    playbook = tmp_path / "play.yaml"
    playbook.write_text(
        "- hosts: all\n  gather_facts: false\n  tasks:\n    - ping:\n"
        "    - copy: {content: hello, dest: /home/deploy/hello}\n"
        "    - command: cat /home/deploy/hello\n      register: said\n"
        "    - assert: {that: said.stdout == 'hello'}\n"
    )
    argv = guest.ssh_argv("deploy")
    options = " ".join(argv[argv.index("-o") : -1])
    inventory = f"guest ansible_host=127.0.0.1 ansible_port={guest.port} ansible_user=deploy "
    inventory += f"ansible_ssh_private_key_file={guest.directory}/key ansible_ssh_common_args='{options}' "
    inventory += "ansible_python_interpreter=/usr/bin/python3\n"
    (tmp_path / "hosts").write_text(inventory)
    # by its module: pip leaves no program in the environment where this machine has Debian's package of it
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "-i", str(tmp_path / "hosts"), str(playbook)],
        capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "HOME": str(tmp_path), "LC_ALL": "C.UTF-8", "ANSIBLE_PIPELINING": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_hundred_processes_at_once(guest: Machine) -> None:
    done = guest.ssh("alice", "for i in $(seq 200); do (sleep 0.5; echo x) & done; wait", timeout=300)
    assert done.out.count("x") == 200


@pytest.mark.parametrize(
    "starts",
    [
        500,
        pytest.param(5000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_a_script_of_many_starts(guest: Machine, starts: int) -> None:
    script = f"i=0; while [ $i -lt {starts} ]; do /usr/bin/true || echo BAD; i=$((i+1)); done; echo done"
    assert guest.ssh("alice", script, timeout=1700).out == "done\n"


def test_ten_logins_at_once(guest: Machine) -> None:
    logins = [
        subprocess.Popen([*guest.ssh_argv("alice"), "ls -d /etc"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        for _ in range(10)
    ]
    assert [login.communicate(timeout=120)[0] for login in logins] == [b"/etc\n"] * 10
