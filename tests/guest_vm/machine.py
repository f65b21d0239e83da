"""A guest VM under QEMU (TCG: the kernels here boot without KVM) and ssh into it.

Each machine runs on an overlay of the image, so nothing it does survives it, and it can be frozen
and put back to that moment.  User-mode networking: the guest reaches this host as 10.0.2.2, this host
reaches the guest's sshd on a forwarded port.
"""

import contextlib
import json
import os
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
from tests.guest_vm.login import Session

HOST_SEEN_FROM_GUEST = "10.0.2.2"
BOOT_TIMEOUT_S = 240
SNAPSHOT = "frozen"


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


def process_of(pidfile: Path) -> int | None:
    """The process that a pid file names, if it lives and its command line names the pid file's directory.

    The second because a file outlives its process, and after a while the number is another's.
    """
    try:
        pid = int(pidfile.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None
    return pid if str(pidfile.parent).encode() in command else None


def ends_with_us(outlive: bool) -> list[str]:
    """What to put before a command that must not be left behind by a killed test run."""
    return [] if outlive else ["setpriv", "--pdeathsig", "TERM", "--"]


class Machine:
    """One running guest.  ``stop`` it, or use ``running``."""

    def __init__(
        self,
        image: Image,
        directory: Path,
        memory_mb: int = 2048,
        options: str = "",
        *,
        stock: bool = False,
        disk: Path | None = None,
    ) -> None:
        """``options`` go to the kernel's command line; ``disk`` is another machine's disk to begin with, copied.

        A ``stock`` machine has two CPUs and randomises addresses as Debian does; any other is made for
        speed.  QEMU translates code once for each virtual address, so address randomisation makes it
        translate every program anew at every exec: without, an exec takes half the time.
        """
        self._set(directory, free_port())
        self.image = image
        self._memory_mb = memory_mb
        self._options = options if stock else f"norandmaps {options}"
        # Nehalem has no wide vector registers to emulate; two emulated CPUs spend their time on each other
        self._processor = ["-cpu", "max", "-smp", "2"] if stock else ["-cpu", "Nehalem", "-smp", "1"]
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(image.key, self._key)
        shutil.copy(image.known_hosts, directory)
        self._key.chmod(0o600)
        if disk is None:
            make = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(image.disk), str(self.disk)]
        else:
            make = ["cp", "--sparse=always", str(disk), str(self.disk)]
        subprocess.run(make, check=True, timeout=120)

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
        self.disk = directory / "overlay.qcow2"
        self._monitor = directory / "qmp"
        self._process: subprocess.Popen[bytes] | None = None
        self._thaws = 0

    def _argv(self) -> list[str]:
        append = "root=/dev/vda rw console=ttyS0 quiet loglevel=4 mitigations=off audit=1"
        append = f"{append} {self._options}".rstrip()
        return [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", *self._processor,
            "-m", str(self._memory_mb), "-nodefaults", "-display", "none",
            "-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd), "-append", append,
            "-drive", f"file={self.disk},if=virtio,format=qcow2,cache=unsafe",
            "-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self.port}-:22",
            "-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci",
            "-serial", f"file:{self.console}", "-pidfile", str(self.pidfile),
            "-qmp", f"unix:{self._monitor},server=on,wait=off",
        ]  # fmt: skip

    def start(self, *, outlive: bool = False) -> None:
        """Boots until sshd answers root.  Raises ``TimeoutError`` with the end of the console.

        The guest ends with the thread that started it, unless it is to ``outlive`` it.
        """
        self._run_until_ssh([*ends_with_us(outlive), *self._argv()])

    def resume(self) -> None:
        """Instead of ``start``: goes on where the machine that the disk was copied from was frozen."""
        self._run_until_ssh([*ends_with_us(outlive=False), *self._argv(), "-loadvm", SNAPSHOT])
        self.must(self._set_clock())

    def _run_until_ssh(self, argv: list[str]) -> None:
        with open(self.directory / "qemu.log", "ab") as log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._await_ssh()

    def _await_ssh(self) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while time.monotonic() < deadline and self._process is not None and self._process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self._greets() and self.ssh("root", "true", timeout=30).code == 0:
                    return
            time.sleep(0.3)
        said = (self.directory / "qemu.log").read_text("utf-8", "replace")
        raise TimeoutError(f"the guest did not come up:\n{said}{self.console_tail()}")

    def _greets(self) -> bool:
        """Whether sshd speaks: to try a login before it does takes the guest as long as one."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as sshd:
            return sshd.recv(4) == b"SSH-"
        return False

    def stop(self) -> None:
        """Ends the guest at once; its disk is an overlay that nobody reads again."""
        self._hang_up()
        if (pid := process_of(self.pidfile)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            self._process = None
        deadline = time.monotonic() + 20
        while process_of(self.pidfile) is not None and time.monotonic() < deadline:
            time.sleep(0.05)

    def cut_power(self) -> None:
        """As if its plug had been pulled: what it has not written to its disk is lost.  Boots until sshd answers."""
        self._tell("system_reset")
        self._hang_up()
        self._await_ssh()

    def cpu_seconds(self) -> float:
        """What the guest has used of this host's CPUs: how busy the host is otherwise does not count."""
        if (pid := process_of(self.pidfile)) is None:
            return 0.0
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def forward(self, port: int) -> int:
        """A port of this host that from now on leads to one of the guest's.  Raises ``RuntimeError``."""
        ours = free_port()
        self._tell(f"hostfwd_add net tcp:127.0.0.1:{ours}-:{port}")
        return ours

    def freeze(self) -> None:
        """Keeps the guest's memory and disk of this moment for ``thaw``.  Raises ``RuntimeError``."""
        self._hang_up()
        self._tell(f"savevm {SNAPSHOT}")

    def thaw(self) -> None:
        """Back to that moment, which for the guest's clock is now.  Connections that were open then are dead."""
        self._hang_up()
        self._tell(f"loadvm {SNAPSHOT}")
        # QEMU's network still knows the connections of before, and the guest would choose the same ports again
        first = 10_000 + self._thaws % 25 * 2_000
        self._thaws += 1
        ports = f"echo {first} {first + 2_000} > /proc/sys/net/ipv4/ip_local_port_range"
        self.must(f"{self._set_clock()}; {ports}")

    @staticmethod
    def _set_clock() -> str:
        return f"date -u -s @{time.time():.0f} >/dev/null"

    def _tell(self, command: str) -> None:
        """One command for QEMU's monitor.  Raises ``RuntimeError`` with its complaint."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(120)
            monitor.connect(str(self._monitor))
            with monitor.makefile("rw") as stream:
                for message in (
                    {"execute": "qmp_capabilities"},
                    {"execute": "human-monitor-command", "arguments": {"command-line": command}},
                ):
                    stream.write(json.dumps(message) + "\n")
                    stream.flush()
                    answer: dict[str, object] = {}
                    while not answer.keys() & {"return", "error"}:  # the greeting and events come in between
                        answer = json.loads(stream.readline())
                    if answer.get("error") or (isinstance(answer["return"], str) and answer["return"].strip()):
                        raise RuntimeError(f"{command}: {answer}")

    def _hang_up(self) -> None:
        """Ends root's kept connection, which would hang on a guest that went away under it."""
        argv = [*self.ssh_argv("root", "-O", "exit", "-o", f"ControlPath={self.directory}/c")]
        subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=20, check=False)

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
            # the key exchange that ssh would choose takes an emulated guest 0.15 s more of each login's 0.9
            "-o", "KexAlgorithms=curve25519-sha256",
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
        kept = ("ControlMaster=auto", f"ControlPath={self.directory}/c", "ControlPersist=600")
        control = tuple(word for option in kept for word in ("-o", option))
        return self.ssh("root", command, timeout=timeout, options=control, stdin=stdin)

    def must(self, command: str, timeout: float = 300, stdin: str | None = None) -> str:
        """As root; raises ``RuntimeError`` with both streams unless it succeeds."""
        done = self.root(command, timeout, stdin)
        if done.code:
            raise RuntimeError(f"{command}: {done.text}")
        return done.out

    def moment(self) -> str:
        """Now, by the guest's clock, which its records have."""
        return self.must("date -u +%FT%T.%6N+00:00").strip()

    def put(self, *sources: Path, to: str) -> None:
        """Copies files into the guest as root."""
        argv = self.ssh_argv("root")
        at = argv.index("-p")
        argv[at], argv[0] = "-P", "scp"
        target = argv.pop()
        words = [*argv, "-q", *map(str, sources), f"{target}:{to}"]
        subprocess.run(words, check=True, timeout=300, stdin=subprocess.DEVNULL)


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
