"""Fails a fast test that leaves a thread, a descriptor, a child process or a mount behind.

What module and session fixtures set up is there before a test and may stay.  As root the tests have a mount
namespace of their own, so that another test process's mounts are none of theirs.
"""

import contextlib
import ctypes
import functools
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 1.0  # what was told to end may take that long
CLONE_NEWNS = 0x00020000
# Production code never closes most of these: they end with the process, so a missing close of one is not seen here.
# They live as long as their process; what a test makes of them is closed at the test's end.
PARTS = [
    ("persona_guest.loop", "Loop", "close"),
    ("persona_guest.gate.hang_watchdog", "HangWatchdog", "close"),
    ("persona_guest.gate.inflight", "InFlight", "close"),
    ("persona_guest.lsm.layer", "AttachedLayer", "close"),
    ("persona_guest.dependencies.resolve", "DependencyChecker", "close"),
    ("persona_guest.dependencies.installer.client", "Installation", "close"),
    ("persona_guest.ipc.pam", "PamSocket", "close"),
    ("persona_guest.ipc.users", "UserSocket", "close"),
    ("persona_guest.standby.service", "Standby", "close"),
    ("persona_guest.kernel.bpf", "Map", "close"),
    ("persona_guest.kernel.inotify", "Inotify", "close"),
    ("persona_guest.enforce.network.egress_routes", "Routing", "hang_up"),
    ("persona_broker.store.sqlite", "SqliteStore", "close"),
    ("persona_broker.audit.chain", "Chain", "close"),
]
MAY_STAY = {"/run/netns"}  # ip-netns(8) mounts it once and for all


@dataclass(frozen=True, slots=True)
class Held:
    """What this process has at one moment."""

    threads: frozenset[threading.Thread]
    descriptors: frozenset[tuple[str, str]]
    processes: frozenset[str]  # of the whole machine: whose child one is is looked at where it is new
    mounts: frozenset[str]

    @classmethod
    def now(cls) -> "Held":
        """Takes some tenths of a millisecond."""
        descriptors = set()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the directory's own
                descriptors.add((name, os.readlink(f"/proc/self/fd/{name}")))
        mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
        return cls(
            frozenset(threading.enumerate()),
            frozenset(descriptors),
            frozenset(name for name in os.listdir("/proc") if name.isdigit()),
            frozenset(mounts - MAY_STAY),
        )

    def beyond(self, before: "Held") -> list[str]:
        """What is there now and was not before."""
        found = [f"thread {thread.name}" for thread in self.threads - before.threads]
        found += [f"descriptor {number}: {target}" for number, target in self.descriptors - before.descriptors]
        found += [f"mount {where}" for where in self.mounts - before.mounts]
        for pid in self.processes - before.processes:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == os.getpid():
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                    found.append(f"child {pid}: {command or 'ended, but nobody waited for it'}")
        return sorted(found)


@contextlib.contextmanager
def _closing_parts() -> Iterator[None]:
    """Closes in the end what was made in the block of the agent's own parts, the last one first."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as made:
        for module, name, close in PARTS:
            if module in sys.modules:
                kind = getattr(sys.modules[module], name)
                patch.setattr(kind, "__init__", _noting(kind.__init__, close, made))
                patch.setattr(kind, close, _once(getattr(kind, close)))
        yield


def _noting(begin: Callable[..., None], close: str, made: contextlib.ExitStack) -> Callable[..., None]:
    @functools.wraps(begin)
    def noted(self: Any, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        made.callback(lambda: getattr(self, close)())

    return noted


def _once(close: Callable[..., None]) -> Callable[..., None]:
    """A second time would close a descriptor that is another's by now."""
    closed: list[Any] = []  # not their ids: which another object may have later

    @functools.wraps(close)
    def first(self: Any) -> None:
        if not any(one is self for one in closed):
            closed.append(self)
            close(self)

    return first


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("guest"):
        yield
        return
    before = Held.now()
    with _closing_parts():
        yield
    deadline = time.monotonic() + PATIENCE_S
    while left := Held.now().beyond(before):
        if time.monotonic() > deadline:
            pytest.fail(f"the test leaves behind: {'; '.join(left)}")
        gc.collect()  # a cycle may keep what nobody holds any more
        time.sleep(0.01)


def pytest_configure(config: pytest.Config) -> None:
    """A mount namespace of our own."""
    workers = getattr(config.option, "numprocesses", None)
    if os.geteuid() or config.option.collectonly or (workers and not hasattr(config, "workerinput")):
        return
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, timeout=20)
