"""A fake cgroup hierarchy in a directory: the build machine's kernel has no controllers to try limits with.

It keeps the rules that the code relies on: files appear with the cgroup, a process is in one cgroup, a
cgroup that hands controllers on holds no process, and one that is not empty stays.
"""

import errno
import os
import shutil
from pathlib import Path

from persona_guest.core.limits import IO_UNLIMITED
from persona_guest.kernel.cgroup import Hierarchy

FILES = {
    "cpu.max": "max 100000",
    "cpu.weight": "100",
    "memory.max": "max",
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
        self.notes: dict[str, str] = {}
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

    def populated(self, cgroup: str) -> bool:
        return bool(self.processes(cgroup)) or any(self.populated(f"{cgroup}/{name}") for name in self.children(cgroup))

    def note(self, cgroup: str, text: str) -> None:
        self.notes[cgroup] = text

    def noted(self, cgroup: str) -> str:
        return self.notes.get(cgroup, "") if self.exists(cgroup) else ""

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
