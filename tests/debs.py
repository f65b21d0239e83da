"""Tiny Debian packages for tests of what installs them."""

import subprocess
from pathlib import Path


def build_deb(
    directory: Path,
    name: str,
    version: str = "1",
    *,
    depends: str = "",
    breaks: str = "",
    postinst: str = "",
    size: int = 0,
) -> Path:
    """Builds ``NAME_VERSION_all.deb``, which brings one file ``/opt/NAME`` of ``size`` bytes."""
    tree = directory / f"tree-{name}-{version}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "opt").mkdir()
    (tree / "opt" / name).write_bytes(b"x" * max(1, size))
    relations = (f"Depends: {depends}\n" if depends else "") + (f"Breaks: {breaks}\n" if breaks else "")
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: T <t@example.org>\n"
        f"{relations}Description: x\n"
    )
    if postinst:
        script = tree / "DEBIAN" / "postinst"
        script.write_text(f"#!/bin/sh\n{postinst}\n")
        script.chmod(0o755)
    deb = directory / f"{name}_{version.replace(':', '%3a')}_all.deb"
    build = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-b", str(tree), str(deb)]
    subprocess.run(build, check=True, capture_output=True)
    return deb
