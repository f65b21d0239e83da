"""One apt-get run that satisfies dependencies from the machine's own sources, and dpkg left consistent after it.

``apt-get satisfy`` (apt-get(8), since 2.0) takes dependencies as Debian writes them.  It is run with an
explicit environment and no shell, its progress read from APT::Status-Fd (apt's README.progress-reporting).
Once dpkg has begun it is left to finish, whatever the time: killed, it would leave packages half installed.
"""

import os
import re
import selectors
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from persona.dependencies import Package
from persona_guest.dependencies.dpkg import Dpkg, DpkgError

LOCK_S = 30.0  # others who install (unattended-upgrades, an operator) are given this to finish
_POLL_S = 2.0
_FETCH_MAX_S = 900.0
_DPKG_MAX_S = 3600.0  # then something hangs for good, and only killing it is left
_EVERY_S = 5.0
_WORDS_MAX = 64 * 1024
_LINE = re.compile(rb"(dlstatus|pmstatus|pmerror|pmconffile):([^:]*):([0-9.]*):(.*)")
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "APT_LISTCHANGES_FRONTEND": "none",
    "HOME": "/root",
}
_OPTIONS = (
    ("DPkg::Lock::Timeout", "0"),  # 'satisfy' would wait in silence; we say for whom
    ("DPkg::Use-Pty", "0"),
    ("DPkg::Options::", "--force-confdef"),  # a question about a configuration file: the machine's own stays
    ("DPkg::Options::", "--force-confold"),
    ("APT::Get::Remove", "false"),  # never take a package away for another
    ("APT::Get::Assume-Yes", "true"),
    ("APT::Update::Error-Mode", "any"),
    ("Acquire::Retries", "1"),
    ("Acquire::http::Timeout", "20"),
    ("Acquire::https::Timeout", "20"),
)
# apt has this run with dpkg's lock held, just before dpkg begins, and stops where it fails (apt.conf(5)).  Its input
# is the transaction, 'NAME OLD < NEW FILE' a line: kept are the names of what is not installed and will be.
_SED = "/bin/sed"
_NOTE = _SED + r" -n 's/^\([a-z0-9][a-z0-9+.-]*\) - < .*/\1/p' >{0} && sync {0}"


class AptError(Exception):
    """It could not be done; the message is apt's or dpkg's own."""


class Apt:
    """``options`` of apt.conf(5) and ``dpkg`` arguments come after ours: a test gives a root of its own.

    ``home`` keeps what is downloaded while it is needed, and from when dpkg begins the note of what this run brings.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        state: Dpkg,
        home: Path,
        options: Sequence[tuple[str, str]] = (),
        dpkg: Sequence[str] = ("dpkg",),
        lock_s: float = LOCK_S,
    ) -> None:
        self._say = say
        self._state = state
        self._archives = home / "archives"
        self._note = home / "installing"
        self._options = [
            *_OPTIONS,
            ("DPkg::Pre-Install-Pkgs::", _NOTE.format(shlex.quote(str(self._note)))),
            (f"DPkg::Tools::Options::{_SED}::Version", "2"),
            ("Dir::Cache::archives", str(self._archives)),
            *options,
        ]
        self._dpkg = list(dpkg)
        self._lock_s = lock_s
        self._said = (b"", 0.0)
        self._began = False  # dpkg has

    def install(self, packages: Iterable[Package]) -> None:
        """All of them, in one run.  Raises ``AptError``; then what this run brought is gone again."""
        wanted = [str(package) for package in packages]
        before = self._known()
        try:
            (self._archives / "partial").mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise AptError(f"{self._archives}: {error.strerror}") from error
        try:
            try:
                self._patiently("satisfy", *wanted)
            except AptError as error:
                if self._began or _LOCK.search(str(error)):
                    raise
                self._say("asking the package sources for news")
                self._again(wanted, self._update())
        except AptError as error:
            if self._began:
                self._repair(error, before)
            raise
        finally:
            self._note.unlink(missing_ok=True)
            shutil.rmtree(self._archives, ignore_errors=True)

    def recover(self) -> None:
        """Puts things back after a run that was cut off (a crash, a power cut).  Raises ``AptError``."""
        if self._note.exists():
            self._repair(AptError("an installation was cut off"))
            self._note.unlink(missing_ok=True)

    def _known(self) -> set[str]:
        """All names that dpkg has something of, be it the configuration of what was removed.  Raises ``AptError``."""
        argv = [*self._dpkg, "--get-selections"]
        try:
            listed = subprocess.run(argv, capture_output=True, env=_ENVIRONMENT, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise AptError(f"dpkg cannot say what there is: {error}") from error
        return {os.fsdecode(line.split()[0].partition(b":")[0]) for line in listed.split(b"\n") if line.strip()}

    def _update(self) -> AptError | None:
        """Renews the package lists, which may be old; returns what is wrong with any source, or ``None``.

        apt renews the lists of the other sources all the same, so that the caller goes on.
        """
        try:
            self._patiently("update")
        except AptError as error:
            return error
        return None

    def _again(self, wanted: list[str], stale: AptError | None) -> None:
        """Tries once more; ``stale`` is why some lists are old, which counts where this fails.  Raises ``AptError``."""
        try:
            self._patiently("satisfy", *wanted)
        except AptError as error:
            if stale is None or self._began or _LOCK.search(str(error)):
                raise
            raise AptError(f"{error}; the package lists cannot be renewed either: {stale}") from error

    # --- apt-get ----------------------------------------------------------------------------------

    def _patiently(self, *words: str) -> None:
        """Gives whoever has a lock some time to finish.  Raises ``AptError``."""
        deadline = time.monotonic() + self._lock_s
        while True:
            try:
                self._run(*words)
            except AptError as error:
                if self._began or not _LOCK.search(str(error)) or time.monotonic() > deadline:
                    raise
                holder = _HOLDER.search(str(error))
                self._say(f"waiting for {holder[1] if holder else 'somebody'}, which is installing something else")
                time.sleep(_POLL_S)
            else:
                return

    def _run(self, *words: str) -> None:
        reading, writing = os.pipe()
        options = [*self._options, ("APT::Status-Fd", str(writing))]
        argv = ["apt-get", "-q", *(word for name, value in options for word in ("-o", f"{name}={value}")), *words]
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=(writing,), env=_ENVIRONMENT,
            )  # fmt: skip
        except OSError as error:
            os.close(reading)
            raise AptError(f"apt-get cannot be run: {error}") from error
        finally:
            os.close(writing)
        try:
            output, late = self._follow(process, reading)
        finally:
            os.close(reading)
        if process.returncode:
            raise AptError(late or own_words(output) or f"apt-get ended with {process.returncode}")

    def _follow(self, process: subprocess.Popen[bytes], status: int) -> tuple[bytes, str]:
        """What it printed, and why it was ended, if so.  A service that it started may keep its output open."""
        if process.stdout is None:  # it is a pipe
            return b"", ""
        output, steps, late = bytearray(), bytearray(), ""
        began = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for fd, buffer in ((process.stdout.fileno(), output), (status, steps)):
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ, buffer)
            while process.poll() is None or selector.get_map():
                ended = process.returncode is not None
                ready = selector.select(0 if ended else 0.5) if selector.get_map() else []
                for key, _ in ready:
                    if block := os.read(key.fd, 65536):
                        key.data.extend(block)
                        del key.data[:-_WORDS_MAX]
                    else:
                        selector.unregister(key.fd)
                self._report(steps)
                if ended and not ready:
                    break
                if not ended and not late and time.monotonic() - began > (_DPKG_MAX_S if self._began else _FETCH_MAX_S):
                    late = "apt-get was at it for too long and was ended"
                    process.terminate()
                if not ready and not selector.get_map():
                    time.sleep(0.1)
        process.stdout.close()
        process.wait()
        return bytes(output), late

    def _report(self, steps: bytearray) -> None:
        """Takes whole lines off; of many, a person sees one every few seconds."""
        while b"\n" in steps:
            line, _, rest = bytes(steps).partition(b"\n")
            steps[:] = rest
            match = _LINE.match(line)
            if match is None:
                continue
            self._began = self._began or match[1] != b"dlstatus"
            phase, at = self._said
            now = time.monotonic()
            if now - at >= _EVERY_S or match[1] != phase:
                self._said = (match[1], now)
                what = "downloading" if match[1] == b"dlstatus" else match[4].decode("utf-8", "replace")
                self._say(f"{what}, {float(match[3] or 0):.0f} %")

    # --- afterwards -------------------------------------------------------------------------------

    def _repair(self, error: AptError, before: set[str] | None = None) -> None:
        """Takes away what this run brought, the rest is dpkg's to finish.  Raises ``AptError``.

        What dpkg knew ``before`` keeps its configuration.  Without ``before``, or once somebody else has been at it,
        what is finished may be theirs: only the unfinished is taken away, and all configuration stays.
        """
        self._say("it failed; putting things back")
        try:
            brought = set(map(os.fsdecode, self._note.read_bytes().split()))
            fresh = brought - before if before is not None else set()
            deadline = time.monotonic() + _DPKG_MAX_S
            while (gone := self._there(brought, fresh)) and time.monotonic() < deadline:
                if not _DPKG_LOCK.search(self._dpkg_says("--remove", "--force-remove-reinstreq", *gone)):
                    break
                fresh = set()
                time.sleep(_POLL_S)
            if fresh:
                self._dpkg_says("--purge", *sorted(fresh))  # not after a wait: then they may be somebody's
        except (OSError, DpkgError) as unreadable:
            raise AptError(f"{error}; afterwards {unreadable}") from error
        self._call("--configure", "-a")
        left = self._call("--audit")
        if left:
            raise AptError(f"{error}; dpkg is left with: {left}") from error

    def _there(self, brought: set[str], fresh: set[str]) -> list[str]:
        now = self._state.installed()
        return sorted((brought & now.unfinished) | (fresh & set(now.versions)))

    def _call(self, *words: str) -> str:
        """dpkg(1) with what it prints; waits for another one to end."""
        deadline = time.monotonic() + _DPKG_MAX_S
        while _DPKG_LOCK.search(said := self._dpkg_says(*words)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return said

    def _dpkg_says(self, *words: str) -> str:
        """It is never interrupted."""
        done = subprocess.run(
            [*self._dpkg, *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=_ENVIRONMENT, check=False,
        )  # fmt: skip
        return " ".join(done.stdout.decode("utf-8", "replace").split())[:1000]


_WORDS = re.compile(r"E: |dpkg: error|dpkg-deb: error|.* Depends: | *installed .* returned error| cannot copy")
_HOLDER = re.compile(r"held by (process [0-9]+ \([^)]*\))")
_DPKG_LOCK = re.compile(r"lock was locked by another process")
_LOCK = re.compile(r"Could not get lock|Unable to acquire|Unable to lock")


def own_words(output: bytes) -> str:
    """What apt-get says is wrong, of all that it says."""
    lines = (line.decode("utf-8", "replace") for line in output.split(b"\n"))
    return "; ".join(dict.fromkeys(line.strip() for line in lines if _WORDS.match(line)))[:800]
