"""A guest VM under QEMU (TCG: the kernels here boot without KVM) and ssh into it.

Each machine runs on an overlay of the image, so nothing it does survives it.  User-mode networking:
the guest reaches this host as 10.0.2.2, this host reaches the guest's sshd on a forwarded port.
"""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.guest_vm.image import HOST_ALIAS, Image, say

HOST_SEEN_FROM_GUEST = "10.0.2.2"
BOOT_TIMEOUT_S = 240


@dataclass(frozen=True, slots=True)
class Result:
    """What a command in the guest did."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both streams, for messages."""
        return f"exit {self.code}\n{self.out}{self.err}"


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Session:
    """A bash of one login, asked command by command."""

    def __init__(self, argv: list[str]) -> None:
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("no pipes")
        self._in, self._out = self.process.stdin, self.process.stdout

    def ask(self, command: str, timeout: float = 60) -> str:
        """What one command line prints, both streams.  Raises ``TimeoutError``."""
        self.write(command)
        return self.read(timeout, command)

    def write(self, command: str) -> None:
        """Starts a command line; ``read`` its output before the next."""
        self._in.write(f"{command}\necho '#'END\n".encode())

    def read(self, timeout: float = 60, command: str = "") -> str:
        """What the command line that was written prints.  Raises ``TimeoutError``."""
        text = b""
        deadline = time.monotonic() + timeout
        while not text.endswith(b"#END\n"):
            if not select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"{command}: no end within {timeout} s: {text!r}")
            chunk = os.read(self._out.fileno(), 65536)
            if not chunk:
                raise EOFError(f"{command}: the session ended: {text!r}")
            text += chunk
        return text.removesuffix(b"#END\n").decode("utf-8", "replace")

    def close(self) -> None:
        """Ends the login."""
        self._in.close()
        self._out.close()
        self.process.wait(30)


class Machine:
    """One running guest.  ``stop`` it, or use ``running``."""

    def __init__(self, image: Image, directory: Path, memory_mb: int = 2048) -> None:
        self._set(directory, free_port())
        self.image = image
        self._memory_mb = memory_mb
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(image.key, self._key)
        shutil.copy(image.known_hosts, directory)
        self._key.chmod(0o600)
        subprocess.run(
            [
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                str(image.disk),
                str(self._overlay),
            ],
            check=True,
            timeout=60,
        )

    @classmethod
    def attach(cls, directory: Path, port: int) -> "Machine":
        """One that another process started."""
        machine = cls.__new__(cls)
        machine._set(directory, port)
        return machine

    def _set(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self.console = directory / "console.log"
        self.pidfile = directory / "pid"
        self._key = directory / "key"
        self._overlay = directory / "overlay.qcow2"

    def _argv(self) -> list[str]:
        append = "root=/dev/vda rw console=ttyS0 quiet loglevel=4 mitigations=off audit=1"
        return [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max",
            "-smp", "2", "-m", str(self._memory_mb), "-nodefaults", "-display", "none",
            "-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd), "-append", append,
            "-drive", f"file={self._overlay},if=virtio,format=qcow2,cache=unsafe",
            "-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self.port}-:22",
            "-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci",
            "-serial", f"file:{self.console}", "-pidfile", str(self.pidfile),
        ]  # fmt: skip

    def start(self) -> None:
        """Boots until sshd answers root.  Raises ``TimeoutError`` with the end of the console."""
        subprocess.run([*self._argv(), "-daemonize"], check=True, stdin=subprocess.DEVNULL, timeout=60)
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self.ssh("root", "true", timeout=30).code == 0:
                    return
            time.sleep(1)
        raise TimeoutError(f"the guest did not come up:\n{self.console_tail()}")

    def stop(self) -> None:
        """Ends the guest at once; its disk is an overlay that nobody reads again."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int(self.pidfile.read_text())
            os.kill(pid, signal.SIGKILL)
            for _ in range(100):
                os.kill(pid, 0)
                time.sleep(0.05)

    def console_tail(self) -> str:
        """The last lines that the guest printed."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.console.read_text("utf-8", "replace").splitlines()[-40:])
        return ""

    def ssh_argv(self, user: str, *options: str) -> list[str]:
        """The ssh command line up to the host; the remote command follows."""
        return [
            "ssh", "-F", "none", "-i", str(self._key), "-p", str(self.port), "-o", "IdentitiesOnly=yes",
            "-o", "StrictHostKeyChecking=yes", "-o", f"UserKnownHostsFile={self.directory}/known_hosts",
            "-o", f"HostKeyAlias={HOST_ALIAS}", "-o", "HostKeyAlgorithms=ssh-ed25519", "-o", "LogLevel=INFO",
            "-o", "ConnectTimeout=20", *options, f"{user}@127.0.0.1",
        ]  # fmt: skip

    def ssh(
        self,
        user: str,
        command: str,
        *,
        tty: bool = False,
        timeout: float = 120,
        stdin: str | None = None,
        options: tuple[str, ...] = (),
    ) -> Result:
        """A login of its own that runs one command line.  Raises ``TimeoutExpired``."""
        options = (*options, "-tt") if tty else options
        done = subprocess.run(
            [*self.ssh_argv(user, *options), "--", command],
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    @contextlib.contextmanager
    def session(self, user: str) -> Iterator[Session]:
        """A login that stays open for the block."""
        session = Session([*self.ssh_argv(user), "exec bash --norc 2>&1"])  # one stream keeps the order
        try:
            yield session
        finally:
            session.close()

    def root(self, command: str, timeout: float = 300, stdin: str | None = None) -> Result:
        """As root, over one kept connection."""
        control = (
            "-o",
            "ControlMaster=auto",
            "-o",
            f"ControlPath={self.directory}/c",
            "-o",
            "ControlPersist=600",
        )
        return self.ssh("root", command, timeout=timeout, options=control, stdin=stdin)

    def must(self, command: str, timeout: float = 300, stdin: str | None = None) -> str:
        """As root; raises ``RuntimeError`` with both streams unless it succeeds."""
        done = self.root(command, timeout, stdin)
        if done.code:
            raise RuntimeError(f"{command}: {done.text}")
        return done.out

    def put(self, *sources: Path, to: str) -> None:
        """Copies files into the guest as root."""
        argv = self.ssh_argv("root")
        at = argv.index("-p")
        argv[at], argv[0] = "-P", "scp"
        target = argv.pop()
        subprocess.run(
            [*argv, "-q", *map(str, sources), f"{target}:{to}"],
            check=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )


@contextlib.contextmanager
def running(image: Image, directory: Path | None = None) -> Iterator[Machine]:
    """A booted machine, stopped at the end of the block."""
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="persona-vm-")))
        machine = Machine(image, directory)
        say("booting the guest")
        try:
            machine.start()
            yield machine
        finally:
            machine.stop()
