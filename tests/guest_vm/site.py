"""A whole small site: a broker on this host over TLS, and a guest that has persona-guest installed by apt."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.guest_vm.image import Image, build, say
from tests.guest_vm.machine import HOST_SEEN_FROM_GUEST, Machine, ends_with_us, free_port, process_of, running

ROOT = Path(__file__).resolve().parents[2]
VM = "analytics-1"


class Broker:
    """``persona-broker serve`` with its record, certificate and token in a private directory.

    Its code is that of the tree ``root``.
    """

    def __init__(self, directory: Path, root: Path = ROOT) -> None:
        self.directory = directory
        self._environment = environment(root)
        self.port, self.events_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self._load: float | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self.run("tls", "init", "--dir", str(directory), "--host", HOST_SEEN_FROM_GUEST, "--host", "127.0.0.1")
        self.run("guest", "add", VM, "--token-file", str(directory / "token"))

    @classmethod
    def attach(cls, directory: Path) -> "Broker":
        """The database of a broker that another process started; it takes commands and ``end``."""
        broker = cls.__new__(cls)
        broker.directory = directory
        broker._environment = environment()
        broker.process = None
        broker._load = None
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
        done = subprocess.run(self.argv(*words), capture_output=True, text=True, timeout=60, env=self._environment)
        if check and done.returncode:
            raise RuntimeError(f"persona-broker {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def records(self, since: str, *words: str) -> list[dict[str, Any]]:
        """The newest of what guests recorded ``since`` such a ``moment``, oldest first: no other test's are in it."""
        lines = self.run("records", "tail", "-n", "50000", "--json", "--since", since, *words).splitlines()
        return [json.loads(line) for line in lines]

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
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, pass_fds=(writing,), env=self._environment,
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

    def documents(self, *paths: Path) -> None:
        """These files and folders become the whole set, policies in this order."""
        with tempfile.TemporaryDirectory() as folder:
            for number, path in enumerate(paths):
                copy = shutil.copytree if path.is_dir() else shutil.copy
                copy(path, Path(folder) / f"{number:02}-{path.name}")
            self.run("apply", "--all", folder, "--yes")

    def load(self, cpu: float) -> None:
        """The host's CPU load from now on, percent."""
        if cpu != self._load:
            self.run("load", "set", f"cpu={cpu:g}")
            self._load = cpu

    def config(self, mode: str = "enforce", extra: str = "") -> str:
        """guest.toml for this broker.

        Emulated, a guest takes ten times as long as a real one for what it does within a question to the broker:
        with the two seconds of a real one a command may be denied where another user keeps the only CPU busy.
        The PAM module waits for six.
        """
        return (
            f'mode = "{mode}"\n[vm]\nname = "{VM}"\n[broker]\n'
            f'url = "https://{HOST_SEEN_FROM_GUEST}:{self.port}"\n'
            f'events_url = "https://{HOST_SEEN_FROM_GUEST}:{self.events_port}"\n'
            f'ca_file = "/etc/persona/ca.pem"\ntoken_file = "/etc/persona/token"\ntimeout_s = 4.0\n{extra}'
        )


def environment(root: Path = ROOT) -> dict[str, str]:
    """This process's environment with the tree ``root`` importable and nothing of the network's proxies."""
    path = os.pathsep.join(str(root / part) for part in ("", "broker", "guest"))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def install(machine: Machine, debs: Path = ROOT / "build" / "debs", to: str = "/root/debs") -> str:
    """Installs persona-guest with apt from packages; apt's own output."""
    machine.must(f"mkdir -p {to}")
    machine.put(*debs.glob("persona-guest_*.deb"), *debs.glob("python3-persona_*.deb"), to=f"{to}/")
    # a guest.toml that is there stays, though a package may bring another
    options = "-y -q --no-install-recommends --allow-downgrades -o Dpkg::Options::=--force-confold"
    return machine.must(f"cd {to} && DEBIAN_FRONTEND=noninteractive apt-get install {options} ./*.deb", timeout=600)


def configure(machine: Machine, broker: Broker, mode: str = "enforce", extra: str = "") -> None:
    """Gives the guest its broker and mode, and waits until its agent is connected."""
    machine.must("install -m 600 /dev/stdin /etc/persona/token", stdin=(broker.directory / "token").read_text())
    machine.must("install -m 644 /dev/stdin /etc/persona/ca.pem", stdin=(broker.directory / "ca.pem").read_text())
    machine.must("install -m 644 /dev/stdin /etc/persona/guest.toml", stdin=broker.config(mode, extra))
    machine.must(f"date -u -s @{time.time():.0f} >/dev/null && systemctl restart persona-agent")
    await_connected(machine)


# An emulated guest takes 1.8 s to start Python for "persona status --json", and 0.2 s to start Perl.
_ASK = (
    "use Socket; socket(S, AF_UNIX, SOCK_SEQPACKET, 0) && connect(S, pack_sockaddr_un(q(/run/persona/agent.sock)))"
    ' || exit 3; alarm 20; send(S, q({"op": "status"}), 0); recv(S, $_, 262144, 0); print'
)


def status(machine: Machine) -> dict[str, Any]:
    """What root's ``persona status --json`` prints; empty where the agent does not answer."""
    done = machine.root(f"perl -e '{_ASK}'")
    answer: dict[str, Any] = json.loads(done.out) if done.code == 0 and done.out else {}
    return answer


def await_connected(machine: Machine, timeout: float = 60) -> None:
    """Until the agent says that its broker is there.  Raises ``TimeoutError`` with the journal."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if status(machine).get("broker") == "connected":
            return
        time.sleep(0.2)
    raise TimeoutError(machine.root("journalctl -u persona-agent -n 50 --no-pager; persona status").text)


@contextlib.contextmanager
def site(directory: Path | None = None, options: str = "", *, stock: bool = False) -> Iterator[tuple[Machine, Broker]]:
    """A broker with the examples applied and a gated guest, both ended afterwards.

    The guest begins with a copy of the installed one, and boots only where it must differ: with ``options``
    for its kernel, or as a ``stock`` machine.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="persona-site-")))
        image = build()
        with installed(image) as disk:
            machine = Machine(image, directory / "vm", options=options, stock=stock, disk=disk)
        stack.callback(machine.stop)
        if options or stock:
            machine.start()
        else:
            machine.resume()
        yield machine, _gate(machine, directory, stack)


@contextlib.contextmanager
def installed(image: Image) -> Iterator[Path]:
    """The disk of a guest in which apt has installed build/debs, with its memory as a snapshot; copy it in the block.

    Made once for these packages (a boot and an installation), and kept in build/installed.
    """
    recipe = hashlib.sha256(str(image.disk).encode())
    for file in (Path(__file__), Path(__file__).with_name("machine.py"), *sorted((ROOT / "build" / "debs").glob("*"))):
        recipe.update(file.read_bytes())
    home = ROOT / "build" / "installed"
    disk = home / f"{recipe.hexdigest()[:16]}.qcow2"
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not disk.exists():
            for old in home.glob("*.qcow2"):
                old.unlink()
            with running(image) as machine:
                say("installing persona-guest in it with apt")
                install(machine)
                machine.must("sync")
                machine.freeze()
                machine.stop()
                shutil.move(machine.disk, disk.with_suffix(".new"))
            disk.with_suffix(".new").rename(disk)
        yield disk


def bring_up(directory: Path, stack: contextlib.ExitStack, *, outlive: bool) -> tuple[Machine, Broker]:
    """A site from the beginning, in steps that say what they do; ``stack`` ends what was started."""
    machine = Machine(build(), directory / "vm")
    stack.callback(machine.stop)
    say("booting the guest")
    machine.start(outlive=outlive)
    say("installing persona-guest in it with apt")
    install(machine)
    say("starting the broker and loading the example personas and policies")
    broker = _gate(machine, directory, stack, outlive=outlive)
    say("the guest is gated")
    return machine, broker


def _gate(machine: Machine, directory: Path, stack: contextlib.ExitStack, *, outlive: bool = False) -> Broker:
    broker = Broker(directory / "broker")
    broker.run("apply", str(ROOT / "examples"))
    broker.load(30)
    stack.callback(broker.stop)
    broker.start(outlive=outlive)
    configure(machine, broker)
    return broker


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is ended and removed
    with installed(build()) as made:
        print(made)
