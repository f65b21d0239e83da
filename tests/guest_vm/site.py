"""A whole small site: a broker on this host over TLS, and a guest that has persona-guest installed by apt."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.guest_vm.image import build, say
from tests.guest_vm.machine import HOST_SEEN_FROM_GUEST, Machine, ends_with_us, free_port, process_of

ROOT = Path(__file__).resolve().parents[2]
VM = "analytics-1"


class Broker:
    """``persona-broker serve`` with its record, certificate and token in a private directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self.events_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.run("tls", "init", "--dir", str(directory), "--host", HOST_SEEN_FROM_GUEST, "--host", "127.0.0.1")
        self.run("guest", "add", VM, "--token-file", str(directory / "token"))

    @classmethod
    def attach(cls, directory: Path) -> "Broker":
        """The record of a broker that another process started; it takes commands and ``end``."""
        broker = cls.__new__(cls)
        broker.directory = directory
        broker.process = None
        return broker

    @property
    def pidfile(self) -> Path:
        """Names the process that serves."""
        return self.directory / "pid"

    def argv(self, *words: str) -> list[str]:
        """The command line of ``persona-broker`` on this record."""
        head = [sys.executable, "-m", "persona_broker", "--config", str(self.directory / "none")]
        return [*head, "--db", str(self.directory / "broker.db"), *words]

    def run(self, *words: str, check: bool = True) -> str:
        """One command; its output.  Raises ``RuntimeError`` where it fails."""
        done = subprocess.run(self.argv(*words), capture_output=True, text=True, timeout=60, env=environment())
        if check and done.returncode:
            raise RuntimeError(f"persona-broker {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def start(self, *, outlive: bool = False) -> None:
        """Serves until ``stop``, or until the thread that called ends; returns when both ports accept."""
        tls = ["--tls-cert", str(self.directory / "broker.crt"), "--tls-key", str(self.directory / "broker.key")]
        binds = ["--bind", f"127.0.0.1:{self.port}", "--events-bind", f"127.0.0.1:{self.events_port}"]
        reading, writing = os.pipe()
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *ends_with_us(outlive),
                    *self.argv("serve", *binds, *tls, "--load-source", "set", "--ready-fd", str(writing)),
                ],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, pass_fds=(writing,), env=environment(),
                start_new_session=True,
            )  # fmt: skip
        os.close(writing)
        self.pidfile.write_text(str(self.process.pid))
        with os.fdopen(reading, "rb") as ready:
            if ready.read(6) != b"ready\n":
                raise RuntimeError((self.directory / "log").read_text())

    def stop(self) -> None:
        """As an operator would: SIGTERM."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
            self.process = None

    def end(self) -> None:
        """``stop`` for one that another process started."""
        if (pid := process_of(self.pidfile)) is not None:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while process_of(self.pidfile) is not None and time.monotonic() < deadline:
            time.sleep(0.05)

    def load(self, cpu: float) -> None:
        """The host's CPU load from now on, percent."""
        self.run("load", "set", f"cpu={cpu:g}")

    def config(self, mode: str = "enforce", extra: str = "") -> str:
        """guest.toml for this broker."""
        return (
            f'mode = "{mode}"\n[vm]\nname = "{VM}"\n[broker]\n'
            f'url = "https://{HOST_SEEN_FROM_GUEST}:{self.port}"\n'
            f'events_url = "https://{HOST_SEEN_FROM_GUEST}:{self.events_port}"\n'
            f'ca_file = "/etc/persona/ca.pem"\ntoken_file = "/etc/persona/token"\n{extra}'
        )


def environment() -> dict[str, str]:
    """This process's environment with the checkout importable and nothing of the network's proxies."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "broker", "guest"))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def install(machine: Machine) -> str:
    """Installs persona-guest with apt from build/debs; apt's own output."""
    debs = ROOT / "build" / "debs"
    machine.must("mkdir -p /root/debs")
    machine.put(*debs.glob("persona-guest_*.deb"), *debs.glob("python3-persona_*.deb"), to="/root/debs/")
    return machine.must(
        "cd /root/debs && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends ./*.deb",
        timeout=600,
    )


def configure(machine: Machine, broker: Broker, mode: str = "enforce", extra: str = "") -> None:
    """Gives the guest its broker and mode, and waits until its agent is connected."""
    machine.must("install -m 600 /dev/stdin /etc/persona/token", stdin=(broker.directory / "token").read_text())
    machine.must("install -m 644 /dev/stdin /etc/persona/ca.pem", stdin=(broker.directory / "ca.pem").read_text())
    machine.must("install -m 644 /dev/stdin /etc/persona/guest.toml", stdin=broker.config(mode, extra))
    machine.must(f"date -u -s @{time.time():.0f} >/dev/null && systemctl restart persona-agent")
    await_connected(machine)


def await_connected(machine: Machine, timeout: float = 60) -> None:
    """Until the agent says that its broker is there.  Raises ``TimeoutError`` with the journal."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if '"broker": "connected"' in machine.root("persona status --json").out:
            return
        time.sleep(0.5)
    raise TimeoutError(machine.root("journalctl -u persona-agent -n 50 --no-pager; persona status").text)


@contextlib.contextmanager
def site(directory: Path | None = None, options: str = "") -> Iterator[tuple[Machine, Broker]]:
    """A broker with the examples applied and a gated guest, both ended afterwards; ``options`` for its kernel."""
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="persona-site-")))
        machine, broker = bring_up(directory, stack, options=options)
        yield machine, broker


def bring_up(
    directory: Path, stack: contextlib.ExitStack, *, outlive: bool = False, options: str = ""
) -> tuple[Machine, Broker]:
    """The same in steps that say what they do; ``stack`` ends what was started."""
    image = build()
    machine = Machine(image, directory / "vm", options=options)
    stack.callback(machine.stop)
    say("booting the guest")
    machine.start(outlive=outlive)
    say("installing persona-guest in it with apt")
    install(machine)
    say("starting the broker and loading the example personas and policies")
    broker = Broker(directory / "broker")
    broker.run("apply", str(ROOT / "examples"))
    broker.load(30)
    stack.callback(broker.stop)
    broker.start(outlive=outlive)
    configure(machine, broker)
    say("the guest is gated")
    return machine, broker
