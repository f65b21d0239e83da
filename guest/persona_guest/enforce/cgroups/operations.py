"""Changes to cgroups, as operations; each touches one cgroup, or moves what lives in it."""

import contextlib
import errno
from dataclasses import dataclass

from persona.problems import PersonaError, Reason
from persona_guest.core.persona_cgroups import LOGIN
from persona_guest.enforce.cgroups.limits import CONTROLLERS, Setting
from persona_guest.kernel.cgroup import Hierarchy

MEMORY_NOTE = "user.persona.memory"
_TRIES = 16  # something is born while its parent is moved


@dataclass(frozen=True, slots=True)
class Make:
    """Makes a cgroup."""

    tree: Hierarchy
    cgroup: str

    def describe(self) -> dict[str, object]:
        return {"op": "cgroup.make", "cgroup": self.cgroup}

    def apply(self) -> None:
        self.tree.make(self.cgroup)

    def undo(self) -> None:
        self.tree.remove(self.cgroup)


@dataclass(frozen=True, slots=True)
class HandOn:
    """Switches controllers on for the cgroups below; what lives in the cgroup itself moves to ``login`` before."""

    tree: Hierarchy
    cgroup: str

    def describe(self) -> dict[str, object]:
        return {"op": "cgroup.hand_on", "cgroup": self.cgroup, "controllers": list(CONTROLLERS)}

    def apply(self) -> None:
        login = f"{self.cgroup}/{LOGIN}"
        for _ in range(_TRIES):
            if self.tree.processes(self.cgroup):
                self.tree.make(login)
                self.tree.empty(self.cgroup, login)
            try:
                self.tree.write(self.cgroup, "cgroup.subtree_control", " ".join(f"+{name}" for name in CONTROLLERS))
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            else:
                return
        raise PersonaError(Reason.ENFORCEMENT_FAILED, f"{self.cgroup} does not stay empty")

    def undo(self) -> None:
        if not self.tree.exists(self.cgroup):
            return
        TakeBack(self.tree, self.cgroup).apply()
        self.tree.empty(f"{self.cgroup}/{LOGIN}", self.cgroup)
        self.tree.remove(f"{self.cgroup}/{LOGIN}")


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Switches controllers off for the cgroups below, so that processes may live in the cgroup itself again."""

    tree: Hierarchy
    cgroup: str

    def describe(self) -> dict[str, object]:
        return {"op": "cgroup.take_back", "cgroup": self.cgroup}

    def apply(self) -> None:
        handed = self.tree.read(self.cgroup, "cgroup.subtree_control").split()
        self.tree.write(self.cgroup, "cgroup.subtree_control", " ".join(f"-{name}" for name in handed))

    def undo(self) -> None:
        HandOn(self.tree, self.cgroup).apply()


@dataclass(frozen=True, slots=True)
class Note:
    """Marks a cgroup as ours, or ours to put back; the mark is the cgroup that its processes came from."""

    tree: Hierarchy
    cgroup: str
    origin: str

    def describe(self) -> dict[str, object]:
        return {"op": "cgroup.note", "cgroup": self.cgroup, "origin": self.origin}

    def apply(self) -> None:
        self.tree.note(self.cgroup, self.origin)

    def undo(self) -> None:
        self.tree.note(self.cgroup, "")


@dataclass(frozen=True, slots=True)
class NoteMemory:
    """Keeps with a cgroup what else is to be known of its memory limit; an empty text removes that."""

    tree: Hierarchy
    cgroup: str
    text: str
    before: str

    def describe(self) -> dict[str, object]:
        return {"op": "cgroup.note_memory", "cgroup": self.cgroup, "value": self.text, "before": self.before}

    def apply(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # the cgroup is gone, and what it was about
            self.tree.note(self.cgroup, self.text, MEMORY_NOTE)

    def undo(self) -> None:
        NoteMemory(self.tree, self.cgroup, self.before, self.text).apply()


@dataclass(frozen=True, slots=True)
class Set:
    """Writes one value; ``before`` is what it was, ``None`` where the cgroup did not exist."""

    tree: Hierarchy
    cgroup: str
    setting: Setting
    before: str | None

    def describe(self) -> dict[str, object]:
        return {
            "op": "cgroup.set",
            "cgroup": self.cgroup,
            "file": self.setting.file,
            "value": self.setting.text,
            "before": self.before,
        }

    def apply(self) -> None:
        try:
            self.tree.write(self.cgroup, self.setting.file, self.setting.text)
        except FileNotFoundError:
            if not self.setting.optional:
                raise

    def undo(self) -> None:
        if self.before is not None:
            with contextlib.suppress(FileNotFoundError):
                before = Setting(self.setting.file, self.before, self.setting.device)
                self.tree.write(self.cgroup, before.file, before.text)


@dataclass(frozen=True, slots=True)
class Empty:
    """Moves what lives in one cgroup to another; ``pids`` lived there when it was planned."""

    tree: Hierarchy
    cgroup: str
    into: str
    pids: tuple[int, ...]

    def describe(self) -> dict[str, object]:
        return {"op": "cgroup.empty", "cgroup": self.cgroup, "into": self.into, "pids": list(self.pids)}

    def apply(self) -> None:
        self.tree.empty(self.cgroup, self.into)

    def undo(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                self.tree.move(self.cgroup, pid)


@dataclass(frozen=True, slots=True)
class Remove:
    """Removes an empty cgroup."""

    tree: Hierarchy
    cgroup: str

    def describe(self) -> dict[str, object]:
        return {"op": "cgroup.remove", "cgroup": self.cgroup}

    def apply(self) -> None:
        self.tree.remove(self.cgroup)

    def undo(self) -> None:
        self.tree.make(self.cgroup)
