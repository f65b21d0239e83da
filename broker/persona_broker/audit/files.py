"""Files of the audit: who may read them, and what makes them last."""

import os
from pathlib import Path


def beside(db: Path) -> Path:
    """The audit's directory, beside the broker's database."""
    return db.parent / "audit"


def private_directory(path: Path) -> None:
    """Makes a directory for the service's user alone, where there is none."""
    if not path.is_dir():
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        give(path)


def give(path: Path) -> None:
    """What root makes belongs to whom the directory around it belongs to: the service must be able to go on with it."""
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def sync_directory(path: Path) -> None:
    """Has the names in a directory outlive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, text: str) -> None:
    """Writes a small file: the old one or the new one is there, whatever happens."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    give(scratch)
    scratch.replace(path)
    sync_directory(path.parent)
