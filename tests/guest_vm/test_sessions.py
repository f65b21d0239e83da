"""Every road to a session is gated, and every session is told why."""

import re
import subprocess
import time

import pytest

from tests.guest_vm.bound import DOCUMENTS, USER, apply, persona, policy
from tests.guest_vm.login import Terminal
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import Broker, configure

UNDER = r"under persona DataAnalyst, policy analysts-by-day \(\S+:\d+\)"
DENIED = re.compile(rf"persona: nmap: denied, no_matching_policy {UNDER}: not in its whitelist")


def test_allowed_commands_run(guest: Machine) -> None:
    done = guest.ssh("alice", "ls -d /etc && ls / | sort | head -n 1 && git --version && python3 -c 'print(6*7)'")
    assert done.code == 0
    assert done.out.splitlines()[:2] == ["/etc", "bin"]
    assert "42" in done.out


def test_a_script_of_the_user_runs_as_its_interpreter(guest: Machine) -> None:
    script = "printf '#!/bin/sh\\necho ran\\n' > s; chmod +x s; ./s; printf '#!/usr/bin/nmap\\n' > t; chmod +x t; ./t"
    done = guest.ssh("alice", script)
    assert done.out == "ran\n"
    assert done.code == 126


@pytest.mark.parametrize("tty", [False, True])
def test_a_denial_says_why_in_one_line(guest: Machine, tty: bool) -> None:
    done = guest.ssh("alice", "nmap --version", tty=tty)
    assert done.code == 126
    assert len(DENIED.findall(done.out + done.err)) == 1
    assert "Nmap version" not in done.out


def test_nobody_that_no_policy_names_logs_in(guest: Machine) -> None:
    done = guest.ssh("bob", "true")
    assert done.code == 255
    assert "bob may not log in to analytics-1, no_matching_policy" in done.err


def test_root_is_never_gated(guest: Machine) -> None:
    done = guest.ssh("root", "nmap --version && grep Seccomp: /proc/self/status")
    assert "Nmap version" in done.out
    assert "Seccomp:\t0" in done.out


def test_break_glass_is_never_gated_and_loud(guest: Machine, broker: Broker) -> None:
    guest.must("usermod -aG persona-break-glass admin")
    began = guest.moment()
    try:
        done = guest.ssh("admin", "nmap --version")
        assert "Nmap version" in done.out
        assert "BREAK GLASS: admin" in guest.must("journalctl -u persona-agent --no-pager -n 100")
        time.sleep(2)
        assert ("break_glass", "admin") in {(record["event"], record["user"]) for record in broker.records(began)}
    finally:
        guest.must("gpasswd -d admin persona-break-glass")


def test_the_user_manager_is_gated(guest: Machine) -> None:
    done = guest.ssh("alice", "systemd-run --user --wait --pipe -q grep Seccomp: /proc/self/status; "
                     "systemd-run --user --wait --pipe -q nmap --version")  # fmt: skip
    assert "Seccomp:\t2" in done.out
    assert "Nmap version" not in done.out
    assert DENIED.search(done.err)


def test_at_is_gated(guest: Machine) -> None:
    job = "(nmap --version || echo refused) > at.out 2>&1"
    wait = "for i in 1 2 3 4 5 6 7 8; do sleep 1; test -s at.out && break; done; cat at.out"
    done = guest.ssh("alice", f"rm -f at.out; echo '{job}' | at now; {wait}")
    assert "refused" in done.out
    assert "Nmap version" not in done.out


def test_cron_is_gated(guest: Machine) -> None:
    guest.must("rm -f /tmp/cron.out; systemctl restart cron")
    job = "* * * * * (nmap --version || echo refused) >> /tmp/cron.out 2>\\&1"
    guest.ssh("alice", f"echo '{job.replace(chr(92), '')}' | crontab -")
    try:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and "refused" not in guest.root("cat /tmp/cron.out").out:
            time.sleep(3)
        found = guest.must("cat /tmp/cron.out")
        assert "refused" in found
        assert "Nmap version" not in found
    finally:
        guest.must("crontab -u alice -r || true")


def test_tmux_outlives_the_login_and_stays_gated(guest: Machine) -> None:
    guest.ssh(
        "alice", "rm -f t.out; tmux -L t -f /dev/null new -d 'sleep 4; (nmap --version || echo refused) > t.out 2>&1'"
    )
    time.sleep(6)
    done = guest.ssh("alice", "cat t.out")
    assert "refused" in done.out
    assert "Nmap version" not in done.out


def test_sftp_subsystem_and_forced_commands_are_decided(guest: Machine) -> None:
    guest.must("sed -i 's/^/command=\"nmap --version\" /' /home/alice/.ssh/authorized_keys")
    try:
        done = guest.ssh("alice", "ls")
        assert DENIED.search(done.err)
        assert "Nmap version" not in done.out
    finally:
        guest.must('sed -i \'s/^command="[^"]*" //\' /home/alice/.ssh/authorized_keys')


def test_sftp_follows_the_whitelist(guest: Machine, broker: Broker) -> None:
    def sftp() -> int:
        argv = guest.ssh_argv("alice")
        argv[0], argv[argv.index("-p")] = "sftp", "-P"
        return subprocess.run(
            [*argv[:-1], "-b", "-", argv[-1]], input="ls\n", text=True, capture_output=True, timeout=60
        ).returncode

    assert sftp() == 0
    broker.load(90)  # AnalystOnBusyHost has no sftp-server
    time.sleep(1)
    assert sftp() != 0


def test_sudo_and_su_inside_a_session_stay_gated(guest: Machine) -> None:
    guest.must("echo 'carol ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/carol; chmod 440 /etc/sudoers.d/carol")
    try:
        run = "/usr/local/bin/forbidden /tmp/escaped"
        inside = f"sudo -n id -u; sudo -n {run}; sudo -n su - root -c '{run}'; sudo -n -u alice {run}; sudo -n -i {run}"
        done = guest.ssh("carol", inside, timeout=60)
        assert done.out.splitlines()[0] == "0"
        assert guest.root("test -e /tmp/escaped").code == 1
        assert (done.out + done.err).count("persona: forbidden: denied") >= 3
        done = guest.ssh("carol", "persona denials >&2; sudo -n persona denials; sudo -n -u alice persona denials")
        assert done.err.count("/usr/local/bin/forbidden: denied") >= 1
        assert (done.out, done.code, done.err.count("this session is another user's")) == ("", 3, 2)
    finally:
        guest.must("rm -f /etc/sudoers.d/carol")


def test_a_session_follows_the_load(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        assert "git version" in session.ask("git --version")
        broker.load(82)
        time.sleep(1)
        refused = session.ask("git --version")
        assert "load_exceeds_threshold" in refused
        assert "82 %, it holds below 70 %" in refused
        assert "/etc" in session.ask("ls -d /etc")  # the next policy's persona
        broker.load(65)  # below 70, and not yet below 60: no flapping
        time.sleep(1)
        assert "load_exceeds_threshold" in session.ask("git --version")
        broker.load(40)
        time.sleep(1)
        assert "git version" in session.ask("git --version")


def test_a_revoked_session_is_denied_everything_at_once(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as session:
        assert session.ask("ls -d /etc") == "/etc\n"
        ident = re.search(r'"session": "(s-[0-9a-f]+)"', session.ask("persona status --json"))
        assert ident is not None
        broker.run("sessions", "revoke", ident[1])
        time.sleep(1)
        said = session.ask("ls -d /etc")
        assert "persona: an operator revoked this session: every command is denied from now on" in said
        assert "session_revoked" in said


def test_complain_mode_stops_nothing_and_records(guest: Machine, broker: Broker) -> None:
    configure(guest, broker, mode="complain")
    began = guest.moment()
    try:
        assert "Nmap version" in guest.ssh("alice", "nmap --version").out
        assert guest.ssh("bob", "echo in").out == "in\n"
        time.sleep(2)
        denied = broker.records(began, "--denied")
        assert {(record["user"], record["program"], record["complain"]) for record in denied} >= {
            ("alice", "/usr/bin/nmap", True),
            ("bob", "", True),  # the login itself
        }
    finally:
        configure(guest, broker)


def test_the_persona_command(guest: Machine) -> None:
    done = guest.ssh(
        "alice",
        "persona status; persona list; persona explain nmap -p 1 x; echo $?; persona explain ls; echo $?; "
        "nmap -p 7 localhost 2>/dev/null; persona denials",
    )
    assert "persona:   DataAnalyst v1 (policy analysts-by-day)" in done.out
    assert "layers:    seccomp, bpf, limits, network\n" in done.out
    assert "AnalystOnBusyHost v1, policy analysts-on-busy-host: applies now" in done.out
    assert "nmap: would be denied, no_matching_policy under DataAnalyst" in done.out
    granted = r"^1\nls: would run under DataAnalyst v1, policy analysts-by-day \(\S+:\d+\)\n0$"
    assert re.search(granted, done.out, re.MULTILINE)
    under = r"under persona DataAnalyst, policy analysts-by-day \(\S+:\d+\)"
    denial = rf"  /usr/bin/nmap: denied, no_matching_policy {under}\n    command: nmap -p 7 localhost\n"
    assert re.search(denial, done.out)


def test_programs_in_a_home(guest: Machine) -> None:
    """Under the kernel layer, by the agent in its sandbox, with the home that the account database names."""
    line = "own/v1/tool -un; echo $?; "
    done = guest.ssh(
        "carol",
        "mkdir -p own/v1; cp /usr/bin/id own/v1/tool; cp /usr/bin/id own/other; export HOME=/tmp; " + line +
        "own/other -un; echo $?; mv own moved; moved/v1/tool -un; echo $?; mv moved own; " + line +
        "chmod u+s own/v1/tool; " + line + "chmod u-s own/v1/tool; " + line +
        "persona explain own/v1/tool; persona explain own/other; persona list | grep home",
    )  # fmt: skip
    explained = "own/v1/tool: would run under Escapist v1, policy escapists ("
    assert done.out.startswith("carol\n0\n126\n126\ncarol\n0\n126\ncarol\n0\n" + explained), done.text
    assert "own/other: would be denied, program_not_trusted" in done.out
    assert "    in your home: own/**/tool\n" in done.out


def test_greeting_only_for_interactive_logins(guest: Machine) -> None:
    line = "persona: DataAnalyst v1 on analytics-1"
    assert line not in guest.ssh("alice", "ls -d /").out
    argv = guest.ssh_argv("alice", "-tt")
    done = subprocess.run(argv, input="exit\n", text=True, capture_output=True, timeout=60)
    assert line in done.stdout


def test_persona_shell_as_login_shell(guest: Machine) -> None:
    guest.must("usermod -s /usr/bin/persona-shell carol")
    try:
        done = guest.ssh("carol", "echo $0; exit 7")
        assert (done.out, done.code) == ("bash\n", 7)
        assert guest.ssh("carol", "/usr/local/bin/forbidden /tmp/x").code == 126
    finally:
        guest.must("usermod -s /bin/bash carol")


def test_persona_shell_where_there_is_no_pam(guest: Machine) -> None:
    guest.put(guest.directory / "key", to="/root/key")
    serve = "/usr/sbin/sshd -p 2222 -o UsePAM=no -o ForceCommand=/usr/bin/persona-shell -o PidFile=/run/sshd2.pid"
    # without PAM, sshd takes a password of '!' for a locked account
    guest.must(f"usermod -p '*' carol; usermod -p '*' bob; {serve}; sleep 1")
    login = "ssh -i /root/key -p 2222 -o StrictHostKeyChecking=no carol@127.0.0.1"
    try:
        done = guest.root(f"{login} 'grep -E \"Seccomp:|NoNewPrivs\" /proc/self/status; exit 7'")
        assert done.code == 7
        assert "NoNewPrivs:\t1" in done.out
        assert "Seccomp:\t2" in done.out
        refused = guest.root(f"{login} '/usr/local/bin/forbidden /tmp/x'")
        assert refused.code == 126
        assert "persona: forbidden: denied" in refused.err
        bob = guest.root(login.replace("carol@", "bob@") + " true")
        assert bob.code == 126
        assert "bob may not log in" in bob.err
    finally:
        guest.must("kill $(cat /run/sshd2.pid); rm /root/key")


def test_the_set_for_login_shells_is_what_they_start_at_a_login(guest: Machine, broker: Broker) -> None:
    """A first and a second login; what of a denial nobody would see, as in the background, is in the record."""
    apply(broker, persona("Shells", {}, ["@login-shell"]), policy("shells", "Shells"))
    began = guest.moment()
    try:
        for shell, asked in (("bash", ""), ("zsh", "Type one of the keys"), ("fish", "")):
            guest.must(f"chsh -s /usr/bin/{shell} {USER}")
            for keys in ("0" if asked else "", ""):
                terminal = Terminal(guest.ssh_argv(USER, "-tt"))
                try:
                    if keys:
                        terminal.expect(asked, 60)
                        terminal.type(keys)
                    terminal.expect("analytics-1", 60)  # the prompt
                    terminal.type("nmap\n")
                    terminal.expect("nmap: denied", 60)
                    terminal.type("exit\n")
                    terminal.end(60)
                finally:
                    terminal.close()
        time.sleep(2)
        denied = broker.records(began, "--user", USER, "--denied")
        assert {record["program"] for record in denied} == {"/usr/bin/nmap"}, denied
        assert len(denied) >= 6
    finally:
        guest.must(f"chsh -s /bin/bash {USER}; rm -f /home/{USER}/.zshrc /home/{USER}/.zcompdump*")
        broker.documents(*DOCUMENTS)
