"""A small network made of namespaces on this machine: ``near`` is the guest, ``far`` the world behind it.

Programs are started in ``near`` in cgroups of the test's own, as sessions live in a guest.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

PROBE = Path(__file__).with_name("netprobe.py")
NEAR4, FAR4, OTHER4 = "10.9.0.1", "10.9.0.2", "10.20.0.2"
NEAR6, FAR6, OTHER6 = "2001:db8:9::1", "2001:db8:9::2", "2001:db8:20::2"
_CLONE_NEWNET = 0x40000000
T = TypeVar("T")


def cgroup_root() -> Path | None:
    """Where cgroup v2 is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2" and os.access(fields[1], os.W_OK):
            return Path(fields[1])
    return None


def available() -> bool:
    """Whether this machine lets us make one."""
    if os.geteuid() or cgroup_root() is None:
        return False
    return subprocess.run(["unshare", "-n", "nft", "list", "tables"], capture_output=True).returncode == 0


class World:
    """Two namespaces, ``near`` and ``far``, joined by a cable; ``far`` answers at six addresses."""

    def __init__(self, name: str, root: Path) -> None:
        self.near, self.far = f"{name}-near", f"{name}-far"
        self.root = root
        self.cgroups = f"{name}/a"
        self._running: list[subprocess.Popen[str]] = []

    def up(self) -> None:
        """Makes it."""
        for name in (self.near, self.far):
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "e0", "netns", self.near, "type", "veth", "peer", "name", "e0", "netns", self.far)
        for name, addresses in ((self.near, (NEAR4, NEAR6)), (self.far, (FAR4, FAR6))):
            self.ip(name, "link", "set", "lo", "up")
            self.ip(name, "link", "set", "e0", "up")
            for address in addresses:
                self.ip(
                    name, "address", "add", address + ("/64" if ":" in address else "/24"), "dev", "e0", *nodad(address)
                )
        for address in (OTHER4, OTHER6):
            self.ip(self.far, "address", "add", address, "dev", "lo", *nodad(address))
        self.ip(self.near, "route", "add", "default", "via", FAR4)
        self.ip(self.near, "-6", "route", "add", "default", "via", FAR6)
        self.near_run("sh", "-c", "echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range")

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """What is started in the block ends with it."""
        before = len(self._running)
        try:
            yield
        finally:
            for process in self._running[before:]:
                process.kill()
                process.wait()
                for stream in (process.stdout, process.stdin):
                    if stream is not None:
                        stream.close()
            del self._running[before:]

    def down(self) -> None:
        """Takes it away."""
        for name in (self.near, self.far):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        top = self.root / self.cgroups.partition("/")[0]
        for directory in sorted(top.rglob("*"), reverse=True):
            if directory.is_dir():
                directory.rmdir()
        if top.is_dir():
            top.rmdir()

    def ip(self, name: str, *words: str) -> None:
        """``ip`` in one of the two."""
        run("ip", "-n", name, *words)

    def near_run(self, *argv: str) -> str:
        """A command in ``near``; its output."""
        return run("nsenter", f"--net=/run/netns/{self.near}", *argv)

    def in_near(self, work: Callable[[], T]) -> T:
        """Calls ``work`` in a thread that is in ``near``: sockets that it makes stay there."""
        return in_namespace(Path("/run/netns") / self.near, work)

    def cgroup(self, name: str) -> str:
        """A cgroup at the level of a session's persona; its path below the root."""
        path = f"{self.cgroups}/scope/{name}"
        (self.root / path).mkdir(parents=True, exist_ok=True)
        return path

    def start(self, *words: str, where: str = "near", cgroup: str = "", uid: int = 0) -> subprocess.Popen[str]:
        """The probe, left running; its first line is read."""
        process = subprocess.Popen(
            self._argv(where, cgroup, uid, *words), text=True, stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        self._running.append(process)
        if process.stdout is None or process.stdout.readline().strip() not in ("ready", "open"):
            raise RuntimeError(f"the probe {words} did not begin")
        return process

    def attempt(
        self, items: Sequence[tuple[str, str, int]], *, where: str = "near", cgroup: str = "", uid: int = 0
    ) -> list[str]:
        """What becomes of each try."""
        done = subprocess.run(
            self._argv(where, cgroup, uid, "try"),
            input=json.dumps(list(items)),
            text=True,
            capture_output=True,
            timeout=120,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        found: list[str] = json.loads(done.stdout)
        return found

    def _argv(self, where: str, cgroup: str, uid: int, *words: str) -> list[str]:
        enter = f'echo $$ > "{self.root / cgroup}/cgroup.procs" && ' if cgroup else ""
        become = f"setpriv --reuid {uid} --clear-groups " if uid else ""
        namespace = Path("/run/netns") / (self.near if where == "near" else self.far)
        script = f'{enter}exec nsenter --net={namespace} {become}"$@"'
        return ["sh", "-c", script, "sh", "/usr/bin/python3", "-I", str(PROBE), *words]


def nodad(address: str) -> tuple[str, ...]:
    """Duplicate address detection takes a second that no test needs."""
    return ("nodad",) if ":" in address else ()


def in_namespace(path: Path, work: Callable[[], T]) -> T:
    """Calls ``work`` in a thread that has entered a network namespace."""
    results: list[T] = []
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            with open(path) as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


@contextlib.contextmanager
def world(name: str) -> Iterator[World]:
    """A world for one test file."""
    root = cgroup_root()
    if root is None:
        raise RuntimeError("no cgroup v2 here")
    found = World(f"{name}{os.getpid()}", root)
    try:
        with found.ending():
            found.up()
            yield found
    finally:
        found.down()


def run(*argv: str) -> str:
    """A command that must succeed; its output."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stdout}{done.stderr}")
    return done.stdout
