"""Puts the kernel layer in place, replaces it by a newer version, takes it away: root's and the package's business.

Everything is pinned below ``/sys/fs/bpf/persona/LAYOUT``: maps by their names, the programs' links in
``links/``.  What is pinned outlives every process.  A newer version is attached beside the one that is
there, over the same maps, and only then takes its place: at no instant is no program attached.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from persona.problems import Fault, PersonaError
from persona_guest.kernel import libbpf
from persona_guest.lsm import abi
from persona_guest.lsm.layer import configure, home
from persona_guest.settings import Settings

_NEW = "-new"  # bpffs allows no dot in a name


class KernelLayerError(PersonaError):
    """The layer could not be loaded; ``log`` is the verifier's where it was the one to refuse."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(Fault.INTERNAL, message)
        self.log = log


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the kernel shows what it can; a test passes other paths."""

    lsm: str = "/sys/kernel/security/lsm"
    btf: str = "/sys/kernel/btf/vmlinux"

    def lacks(self, directory: str) -> str | None:
        """Why this kernel cannot have the layer, for a person; ``None`` where nothing speaks against it."""
        try:
            names = os.fsdecode(Path(self.lsm).read_bytes().removesuffix(b"\n")).split(",")
        except OSError as error:
            return f"{self.lsm}: {error.strerror}"
        if "bpf" not in names:
            return f"bpf is not among the kernel's security modules ({','.join(names)}); see lsm= in docs/security.md"
        if not os.path.exists(self.btf):
            return f"the kernel has no type information ({self.btf})"
        if not os.path.isdir(os.path.dirname(directory)):
            return f"no bpf file system at {os.path.dirname(directory)}"
        return None


def load(settings: Settings, machine: Machine) -> None:
    """Loads and attaches, or replaces what is there.  Raises ``KernelLayerError``; what was there then stays."""
    directory = settings.paths.bpf_dir
    lacking = machine.lacks(directory)
    if lacking is not None:
        raise KernelLayerError(lacking)
    links = home(directory) / "links"
    try:
        links.mkdir(mode=0o700, parents=True, exist_ok=True)
        with libbpf.BpfObject(settings.paths.bpf_object) as programs:
            programs.pin_maps(str(home(directory)))
            programs.load()
            configure(settings)
            _attach(programs, links)
    except libbpf.LoadError as error:
        raise KernelLayerError(str(error), error.log) from error
    except OSError as error:
        raise KernelLayerError(f"the kernel layer cannot be loaded: {error}") from error
    for other in Path(directory).iterdir():
        if other.name != abi.LAYOUT:
            shutil.rmtree(other)


def _attach(programs: libbpf.BpfObject, links: Path) -> None:
    for left in links.glob(f"*{_NEW}"):
        left.unlink()  # a loader that was killed
    found = programs.programs()
    try:
        for name in abi.PROGRAMS:
            programs.attach(found[name], f"{links}/{name}{_NEW}")
    except (OSError, KeyError):
        for left in links.glob(f"*{_NEW}"):
            left.unlink()
        raise
    for name in abi.PROGRAMS:
        (links / f"{name}{_NEW}").rename(links / name)  # the last hold on the old link: it detaches


def unload(directory: str) -> None:
    """Detaches everything and frees the maps; nothing there is no error.  Raises ``OSError``."""
    if not directory:  # no layer is wanted: an empty path would be the current directory
        return
    for links in Path(directory).glob("*/links"):
        shutil.rmtree(links)  # programs first: without maps they would refuse everybody
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
