"""A fake cgroup hierarchy in a directory: the build machine's kernel has no controllers to try limits with.

It keeps the rules that the code relies on: files appear with the cgroup, a process is in one cgroup, a
cgroup that hands controllers on holds no process, and one that is not empty stays.
"""

import errno
import os
import shutil
from pathlib import Path

from persona_guest.enforce.cgroups.limits import IO_UNLIMITED
from persona_guest.kernel.cgroup import Hierarchy

FILES = {
    "cpu.max": "max 100000",
    "cpu.weight": "100",
    "memory.max": "max",
    "memory.current": "0",
    "memory.stat": "",
    "memory.swap.max": "max",
    "pids.max": "max",
    "io.max": "",
    "io.weight": "default 100",
    "cgroup.freeze": "0",
    "cgroup.events": "frozen 0",
}


class FakeHierarchy(Hierarchy):
    """As ``Hierarchy``, on plain files."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        root.mkdir(exist_ok=True)
        self.notes: dict[tuple[str, str], str] = {}
        self._fill("")

    def _fill(self, cgroup: str) -> None:
        for file, text in {**FILES, "cgroup.procs": "", "cgroup.subtree_control": ""}.items():
            Path(self.path(cgroup, file)).write_text(text + "\n")

    def grow(self, cgroup: str, *pids: int) -> None:
        """A cgroup with all that are above it, as systemd would make them, and processes."""
        at = ""
        for part in cgroup.split("/"):
            at = f"{at}/{part}".lstrip("/")
            self.make(at)
        Path(self.path(cgroup, "cgroup.procs")).write_text("".join(f"{pid}\n" for pid in pids))

    def make(self, cgroup: str) -> None:
        if not self.exists(cgroup):
            os.mkdir(self.path(cgroup))
            self._fill(cgroup)

    def remove(self, cgroup: str) -> None:
        if not self.exists(cgroup):
            return
        if self.processes(cgroup) or self.children(cgroup):
            raise OSError(errno.EBUSY, "busy", cgroup)
        shutil.rmtree(self.path(cgroup))
        self.notes = {key: text for key, text in self.notes.items() if key[0] != cgroup}

    def populated(self, cgroup: str) -> bool:
        return bool(self.processes(cgroup)) or any(self.populated(f"{cgroup}/{name}") for name in self.children(cgroup))

    def note(self, cgroup: str, text: str, name: str = "user.persona") -> None:
        self.notes[cgroup, name] = text

    def noted(self, cgroup: str, name: str = "user.persona") -> str:
        return self.notes.get((cgroup, name), "") if self.exists(cgroup) else ""

    def use(self, cgroup: str, shmem: int, cache: int = 0) -> None:
        """So much memory is counted in a cgroup: ``shmem`` that stays, and ``cache`` that the kernel could drop."""
        Path(self.path(cgroup, "memory.current")).write_text(f"{shmem + cache}\n")
        stat = f"anon 0\nfile {shmem + cache}\nshmem {shmem}\nslab_reclaimable 0\nslab_unreclaimable 0\n"
        Path(self.path(cgroup, "memory.stat")).write_text(stat)

    def write(self, cgroup: str, file: str, text: str) -> None:
        path = Path(self.path(cgroup, file))
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        if file == "cgroup.procs":
            if self.read(cgroup, "cgroup.subtree_control").split():
                raise OSError(errno.EBUSY, "it hands controllers on")
            for other in Path(self.root).rglob("cgroup.procs"):
                other.write_text("".join(f"{pid}\n" for pid in other.read_text().split() if pid != text))
            path.write_text(path.read_text() + text + "\n")
        elif file == "cgroup.subtree_control":
            on = set(path.read_text().split())
            for word in text.split():
                on = on | {word[1:]} if word[0] == "+" else on - {word[1:]}
            if on and self.processes(cgroup):
                raise OSError(errno.EBUSY, "processes live in it")
            path.write_text(" ".join(sorted(on)) + "\n")
        elif file == "io.max":
            device, _, value = text.partition(" ")
            lines = [line for line in path.read_text().splitlines() if not line.startswith(device + " ")]
            path.write_text("\n".join([*lines, *([text] if value != IO_UNLIMITED else [])]) + "\n")
        else:
            path.write_text(text + "\n")
            if file == "cgroup.freeze":
                Path(self.path(cgroup, "cgroup.events")).write_text(f"frozen {text}\n")
