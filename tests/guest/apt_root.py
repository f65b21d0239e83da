"""An apt and a dpkg of their own, below a directory: a real package source of tiny packages, a real status file."""

import gzip
import hashlib
import subprocess
from pathlib import Path
from typing import Any

from persona_guest.dependencies.dpkg import Dpkg
from persona_guest.dependencies.installer.apt import Apt

from persona.dependencies import Package, parse_dependency
from tests.debs import build_deb


class AptRoot:
    """``package`` adds to the source, ``options`` and ``dpkg`` make apt-get and dpkg work below ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = path / "source"
        for directory in (
            "source", "etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/trusted.gpg.d",
            "var/lib/apt/lists/partial", "var/cache/apt", "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/log/apt",
            "tmp",
        ):  # fmt: skip
            (path / directory).mkdir(parents=True)
        (path / "var/lib/dpkg/status").touch()
        (path / "etc/apt/sources.list").write_text(f"deb [trusted=yes] file:{self.source} ./\n")
        self.publish()

    @property
    def status(self) -> Path:
        return self.path / "var/lib/dpkg/status"

    @property
    def options(self) -> list[tuple[str, str]]:
        dpkg = [("Dpkg::Options::", word) for word in self.dpkg[1:]]
        return [
            ("Dir", str(self.path)),
            ("Dir::State::status", str(self.status)),
            ("Dir::Etc", f"{self.path}/etc/apt"),
            ("APT::Architecture", "amd64"),
            ("APT::Sandbox::User", "root"),
            *dpkg,
        ]

    @property
    def dpkg(self) -> list[str]:
        return [
            "dpkg",
            f"--root={self.path}",
            "--force-script-chrootless",
            "--force-not-root",
            f"--log={self.path}/log",
        ]

    def package(self, name: str, version: str = "1", *, conffile: bool = False, **fields: Any) -> None:
        """A tiny package, published; ``fields`` as of ``build_deb``.  Its one file may be a conffile."""
        deb = build_deb(self.path / "tmp", name, version, **fields)
        if conffile:
            tree = self.path / "tmp" / f"tree-{name}-{version}"
            (tree / "DEBIAN" / "conffiles").write_text(f"/opt/{name}\n")
            subprocess.run(
                ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(deb)], check=True, capture_output=True
            )
        deb.rename(self.source / deb.name)
        self.publish()

    def publish(self) -> None:
        """The source's index, as dpkg-scanpackages writes it."""
        stanzas = []
        for deb in sorted(self.source.glob("*.deb")):
            control = subprocess.run(["dpkg-deb", "-f", str(deb)], check=True, capture_output=True, text=True).stdout
            data = deb.read_bytes()
            sums = f"Size: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
            stanzas.append(f"{control.strip()}\nFilename: ./{deb.name}\n{sums}")
        (self.source / "Packages").write_text("\n".join(stanzas))
        with gzip.open(self.source / "Packages.gz", "wt") as file:
            file.write("\n".join(stanzas))

    def operator(self, *words: str) -> None:
        """Somebody else's dpkg; a word with a version is a package of the source."""
        debs = [str(self.source / f"{word}_all.deb") if "_" in word else word for word in words]
        subprocess.run([*self.dpkg, *debs], check=True, capture_output=True)

    def audit(self) -> str:
        """What dpkg finds wrong."""
        return subprocess.run([*self.dpkg, "--audit"], capture_output=True, text=True, check=False).stdout


def apt(root: AptRoot, said: list[str] | None = None, **options: str) -> Apt:
    """The installer's apt on that root."""
    say = said.append if said is not None else lambda _line: None
    return Apt(say, Dpkg(root.status), root.path / "home", [*root.options, *options.items()], root.dpkg, 1)


def wish(*texts: str) -> list[Package]:
    """The packages of these dependencies."""
    return [item for text in texts if isinstance(item := parse_dependency(text), Package)]


def installed(root: AptRoot) -> set[str]:
    """The names of what dpkg has there."""
    return set(Dpkg(root.status).installed().versions)
