"""Released versions as they were, for the tests of two versions at once.

An archive and not the history: a clone may have none.  It has what the packages are built from, and is made by
``git archive COMMIT PATHS | xz -9e`` with the two below, so that who has the history can compare.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path

# The last commit whose packages say 0.1.0 and whose protocol is version 1; what came after it became 0.2.0.
COMMIT = "1948e9e26450c74bd9c2c7070f2e828d9235117b"
PATHS = ("persona", "broker", "guest", "systemd", "packaging", "examples", "LICENSE", "setup.cfg", "pyproject.toml")
ARCHIVE = Path(__file__).with_name("persona-0.1.0.tar.xz")


def unpack(directory: Path) -> Path:
    """The tree of 0.1.0 in a directory of its own below this one."""
    tree = directory / "persona-0.1.0"
    tree.mkdir()
    subprocess.run(["tar", "-C", str(tree), "-xJf", str(ARCHIVE)], check=True)
    return tree


def build_debs(directory: Path) -> Path:
    """The directory of the Debian packages of 0.1.0, which are built there unless they are."""
    if not list(directory.glob("persona-guest_0.1.0_*.deb")):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            tree = unpack(Path(scratch))
            (tree / "packaging" / "debian").rename(tree / "debian")
            subprocess.run(["dpkg-buildpackage", "-us", "-uc", "-b"], cwd=tree, check=True, capture_output=True)
            for deb in Path(scratch).glob("*.deb"):
                shutil.copy(deb, directory)
    return directory
