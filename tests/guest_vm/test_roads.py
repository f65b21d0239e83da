"""The other roads to a shell or to a command of one's own: each is gated, or root's."""

import json
import subprocess
import time

from tests.guest_vm.conftest import Compiler
from tests.guest_vm.login import Terminal
from tests.guest_vm.machine import HOST_SEEN_FROM_GUEST, Machine
from tests.guest_vm.site import Broker

DENIED = "persona: nmap: denied, no_matching_policy under persona DataAnalyst"


def test_a_second_login_is_gated_like_the_first(guest: Machine) -> None:
    with guest.session("alice") as first, guest.session("alice") as second:
        idents = set()
        for session in (first, second, first):
            assert DENIED in session.ask("nmap --version")
            assert session.ask("ls -d /etc") == "/etc\n"
            idents.add(json.loads(session.ask("persona status --json"))["session"])
        assert len(idents) == 2


def test_a_revoked_session_has_nothing_of_its_siblings(guest: Machine, broker: Broker) -> None:
    with guest.session("alice") as revoked, guest.session("alice") as sibling:
        for session in (revoked, sibling):
            assert session.ask("ls -d /etc") == "/etc\n"
        broker.run("sessions", "revoke", json.loads(revoked.ask("persona status --json"))["session"])
        time.sleep(1)
        for _ in range(3):
            assert sibling.ask("ls -d /etc") == "/etc\n"
            assert "session_revoked" in revoked.ask("ls -d /etc")


def test_a_lingering_user_manager_is_gated(guest: Machine) -> None:
    unit = "[Service]\\nType=oneshot\\nExecStart=/usr/local/bin/forbidden /tmp/lingered\\n"
    unit += "ExecStart=/usr/bin/touch /tmp/lingered-too\\n[Install]\\nWantedBy=default.target\\n"
    free = unit.replace("ExecStart=/usr/local/bin/forbidden /tmp/lingered\\n", "")
    guest.must("loginctl enable-linger alice; rm -f /tmp/lingered*")
    try:
        for name, text in (("x", unit), ("y", free)):
            guest.ssh(
                "alice",
                f"mkdir -p ~/.config/systemd/user/default.target.wants; cd ~/.config/systemd/user; printf '{text}' > "
                f"{name}.service; ln -sf ../{name}.service default.target.wants/",
            )
        guest.must("systemctl restart user@1000.service; sleep 3")
        assert guest.root("test -e /tmp/lingered").code == 1
        assert guest.root("test -e /tmp/lingered-too").code == 0  # the manager is there and starts what it may
    finally:
        guest.must(
            "loginctl disable-linger alice; rm -rf /home/alice/.config/systemd; systemctl stop user@1000 || true"
        )


def test_su_and_login_by_root_give_a_gated_session(guest: Machine) -> None:
    done = guest.root("su - alice -c 'nmap --version; ls -d /etc'")
    assert DENIED in done.err
    assert done.out == "/etc\n"
    terminal = Terminal([*guest.ssh_argv("root", "-tt"), "login -f alice"])
    try:
        terminal.expect("$ ")
        terminal.type("nmap --version\n")
        terminal.expect(DENIED)
        terminal.type("persona status\n")
        terminal.expect("DataAnalyst")
    finally:
        terminal.close()


def test_tmux_on_a_terminal(guest: Machine) -> None:
    terminal = Terminal([*guest.ssh_argv("alice", "-tt"), "tmux -f /dev/null -L shown"])
    try:
        terminal.expect("$ ", 60)
        terminal.type("nmap --version\n")
        terminal.expect("persona: nmap: denied", 60)
        terminal.type("echo $((6*7))-answer; exit\n")
        terminal.expect("42-answer", 60)
    finally:
        terminal.close()


def test_cron_at_reboot_is_gated(guest: Machine) -> None:
    guest.ssh("alice", "echo '@reboot (nmap --version || echo refused) > /tmp/reboot.out 2>&1' | crontab -")
    try:
        guest.must("rm -f /run/crond.reboot /tmp/reboot.out; systemctl restart cron")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and "refused" not in guest.root("cat /tmp/reboot.out").out:
            time.sleep(1)
        found = guest.must("cat /tmp/reboot.out")
        assert "refused" in found
        assert "Nmap version" not in found
    finally:
        guest.must("crontab -u alice -r")


def test_no_subsystem_but_what_is_whitelisted(guest: Machine) -> None:
    guest.must("printf 'Subsystem scan /usr/bin/nmap --version\\n' > /etc/ssh/sshd_config.d/scan.conf; "
               "systemctl reload ssh; sleep 1")  # fmt: skip
    try:
        argv = [*guest.ssh_argv("alice", "-s"), "scan"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
        assert (done.stdout, done.returncode) == ("", 126)  # sshd gives a subsystem no standard error
    finally:
        guest.must("rm /etc/ssh/sshd_config.d/scan.conf; systemctl reload ssh; sleep 1")


def test_sudo_s_own_hooks_and_pty_are_gated(guest: Machine) -> None:
    """A root shell by sudo, its children orphaned to init, is the user's still."""
    guest.must("echo 'carol ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/carol; chmod 440 /etc/sudoers.d/carol; "
               "rm -f /tmp/orphan*")  # fmt: skip
    try:
        inside = "(setsid sh -c 'sleep 1; /usr/local/bin/forbidden /tmp/orphan; touch /tmp/orphan-ran' &)"
        guest.ssh("carol", f'sudo -n sh -c "{inside}"; sleep 2', timeout=60)
        guest.must("for i in $(seq 20); do test -e /tmp/orphan-ran && exit 0; sleep 1; done; exit 1")
        assert guest.root("test -e /tmp/orphan").code == 1
    finally:
        guest.must("rm -f /etc/sudoers.d/carol")


# As pkexec and doas do: becomes root as a whole, and is the program that was asked for, with no user above it.
BECOME = r"""
#include <unistd.h>
int main(int argc, char **argv) { return setuid(0) || execv(argv[1], argv + 1); }
"""


def test_the_first_process_of_a_session_is_none_of_the_service_s_own_as_root(
    guest: Machine, static_c: Compiler
) -> None:
    """It is a child of the root process of su, cron or login that opened the session, as the service's own are."""
    guest.put(static_c.compile("become", BECOME), to="/usr/local/bin/become")
    guest.must("chmod 4755 /usr/local/bin/become; rm -f /tmp/became*; sleep 2")
    inside = "/usr/local/bin/forbidden /tmp/became; touch /tmp/became-so"
    try:
        guest.root(f"su - carol -c 'exec become /bin/sh -c \"{inside}\"'", timeout=60)
        guest.must("test -e /tmp/became-so")
        assert guest.root("test -e /tmp/became").code == 1
    finally:
        guest.must("rm -f /usr/local/bin/become")


def test_a_guest_may_ask_only_about_itself(guest: Machine, broker: Broker) -> None:
    script = f"""
import json, ssl, urllib.error, urllib.request
context = ssl.create_default_context(cafile="/etc/persona/ca.pem")
token = open("/etc/persona/token").read().strip()
def post(vm, path="/v1/admissions", token=token):
    body = {{"session": "s-0000000000000001", "subject": {{"user": "alice", "groups": [], "vm": vm}},
            "service": "sshd", "remote": ""}}
    request = urllib.request.Request("https://{HOST_SEEN_FROM_GUEST}:{broker.port}" + path, json.dumps(body).encode(),
        {{"Authorization": "Bearer " + token, "Content-Type": "application/json"}})
    try:
        return urllib.request.urlopen(request, context=context, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["code"]
print(post("analytics-1"), post("analytics-2"), post("analytics-2", "/v1/sessions"),
      post("analytics-1", token="x" * 43))
"""
    done = guest.root("python3 -", stdin=script)
    assert done.out == "200 (403, 'not_your_vm') (403, 'not_your_vm') (401, 'unauthenticated')\n", done.text
