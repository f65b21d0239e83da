"""X11 forwarding: on the guest's loopback and back over the ssh connection, for whoever may run xauth."""

import os
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest
import yaml

from tests.guest_vm.bound import USER, bound
from tests.guest_vm.machine import Machine
from tests.guest_vm.site import ROOT, Broker

# What a client says first (X11 protocol, 8), with the cookie that sshd gave it; prints what comes back.
CLIENT = r"""
import os, socket, struct, subprocess
display = os.environ["DISPLAY"]
words = subprocess.run(["xauth", "list", display], capture_output=True, text=True).stdout.split()
cookie = bytes.fromhex(words[-1]) if words else bytes(16)
with socket.create_connection(("127.0.0.1", 6000 + int(display.split(":")[1].split(".")[0])), 20) as x:
    x.sendall(struct.pack("<BxHHHHxx", ord("l"), 11, 0, 18, 16) + b"MIT-MAGIC-COOKIE-1\0\0" + cookie)
    print("answer", x.recv(5))
"""


def documented() -> list[str]:
    """The entries of a whitelist that docs/network.md says X11 forwarding needs."""
    text = (ROOT / "docs" / "network.md").read_text()
    block = next(block for block in text.split("```yaml\n")[1:] if "xauth" in block)
    return list(yaml.safe_load(block.partition("```")[0])["command_whitelist"])


@pytest.fixture
def display() -> Iterator[str]:
    """A display of this host: a fake X server, which says hello to whoever gets through to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        if server.getsockname()[1] < 6000:
            pytest.skip("this machine's free ports are below X11's")

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(64)
                    connection.sendall(b"hello")

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1] - 6000}"


def run(guest: Machine, display: str) -> str:
    done = subprocess.run(
        [*guest.ssh_argv(USER, "-Y"), "python3 -"], input=CLIENT, capture_output=True, text=True, timeout=90,
        env={**os.environ, "DISPLAY": display}, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_a_client_reaches_its_user_s_display_whatever_the_network_rules(
    guest: Machine, broker: Broker, display: str
) -> None:
    with bound(broker, {}, whitelist=["python3 **", *documented()], network_access=[]):
        assert "answer b'hello'" in run(guest, display)


def test_without_xauth_in_the_whitelist_the_display_refuses(guest: Machine, broker: Broker, display: str) -> None:
    with bound(broker, {}, whitelist=["**", "!xauth"], network_access=[]):
        said = run(guest, display)
    assert "xauth: denied" in said
    assert "answer b'hello'" not in said
