"""In the guest: views.py [UID] < CASES, each line VIEW TARGET OTHER STARTED PROGRAM; prints an exit code for each.

Starts STARTED where the path TARGET leads to the file OTHER, for that process and no other: by mounts and
roots of a user's own, which need no privilege but a user namespace.

With UID, by root: writes down for the kernel layer first what the agent approves that is shown PROGRAM and the
machine's own files; then a process with that login uid does the start.  It has no filter, so nobody asks the agent.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 0x1000, 0x4000, 0x40000, 2
NEWNS, NEWUSER, NEWPID = 0x00020000, 0x10000000, 0x20000000
SYS_PIVOT_ROOT = 155
PR_SET_DUMPABLE = 4
libc = ctypes.CDLL(None, use_errno=True)


def must(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def unshare(flags: int) -> None:
    """Namespaces of its own, and root in them."""
    uid, gid = os.getuid(), os.getgid()
    must(libc.unshare(flags | (NEWUSER if uid else 0)))
    if uid:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {uid} 1")
        write("/proc/self/gid_map", f"0 {gid} 1")
    if flags & NEWNS:
        mount("none", "/", MS_REC | MS_PRIVATE)


def mount(source: str, target: str, flags: int, kind: str | None = None, options: str | None = None) -> None:
    must(libc.mount(source.encode(), target.encode(), kind and kind.encode(), flags, options and options.encode()))


def scratch() -> str:
    """A new directory of the caller's own."""
    path = f"{os.environ['SCRATCH']}/{os.getpid()}"
    os.makedirs(path)
    return path


def bind(target: str, other: str) -> None:
    """OTHER mounted over TARGET."""
    unshare(NEWNS)
    mount(other, os.path.realpath(target), MS_BIND)


def pid_namespace(target: str, other: str) -> None:
    """The same among processes of its own, where other numbers name them."""
    unshare(NEWNS | NEWPID)
    mount(other, os.path.realpath(target), MS_BIND)
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    mount("proc", "/proc", 0, "proc")


def built_root(target: str, other: str) -> str:
    """A directory that has what the machine has, by mounts, and OTHER as TARGET."""
    unshare(NEWNS)
    root = scratch()
    mount("/", root, MS_BIND | MS_REC)
    mount(other, root + os.path.realpath(target), MS_BIND)
    return root


def chroot(target: str, other: str) -> None:
    """A root made of mounts."""
    root = built_root(target, other)
    os.chroot(root)
    os.chdir("/")


def pivot_root(target: str, other: str) -> None:
    """The same, the old root put away."""
    root = built_root(target, other)
    os.chdir(root)
    must(libc.syscall(SYS_PIVOT_ROOT, b".", b"."))
    must(libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def plain_chroot(target: str, other: str) -> None:
    """A root of hard links and copies in a directory of its own, without any mount."""
    root = scratch()
    for path in os.environ["NEEDED"].split(":"):
        into = Path(root + path)
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, into)
    into = Path(root + target)
    into.parent.mkdir(parents=True, exist_ok=True)
    into.unlink(missing_ok=True)
    shutil.copy(other, into)
    unshare(0)
    os.chroot(root)
    os.chdir("/")


def overlay(target: str, other: str) -> None:
    """An overlay over TARGET's directory whose upper layer has OTHER."""
    unshare(NEWNS)
    work = scratch()
    mount("tmpfs", work, 0, "tmpfs")
    directory, name = os.path.split(os.path.realpath(target))
    for part in ("upper", "work"):
        os.mkdir(f"{work}/{part}")
    shutil.copy(other, f"{work}/upper/{name}")
    mount("overlay", directory, 0, "overlay", f"lowerdir={directory},upperdir={work}/upper,workdir={work}/work")


def tmpfs(target: str, other: str) -> None:
    """A tmpfs over TARGET's directory, with links to what was there and a copy of OTHER."""
    unshare(NEWNS)
    directory, name = os.path.split(os.path.realpath(target))
    kept = scratch()
    mount(directory, kept, MS_BIND | MS_REC)
    mount("tmpfs", directory, 0, "tmpfs")
    names = {name, os.path.basename(target)}
    for entry in os.listdir(kept):
        if entry not in names:
            os.symlink(f"{kept}/{entry}", f"{directory}/{entry}")
    for name in names:
        shutil.copy(other, f"{directory}/{name}")


def fuse(target: str, other: str) -> None:
    """A file of a FUSE file system of its own, mounted over TARGET."""
    unshare(NEWNS)
    image = scratch()
    # its one file is a copy of OTHER
    subprocess.run(["squashfuse", os.environ["IMAGE"], image], stderr=subprocess.DEVNULL, check=True, timeout=60)
    mount(f"{image}/{os.path.basename(other)}", os.path.realpath(target), MS_BIND)


VIEWS: dict[str, Callable[[str, str], None]] = {
    function.__name__: function
    for function in (bind, pid_namespace, chroot, pivot_root, plain_chroot, overlay, tmpfs, fuse)
}


def start(view: str, target: str, other: str, started: str, program: str, login: int | None) -> int:
    """The exit code of the program, or 100 and the errno with which it did not start."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(writing)
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)  # the cases are not for a shell to read
            if login is not None:
                become(login)
            if view != "none":
                VIEWS[view](target, other)
            os.read(reading, 1)
            os.execv(started, [started])
        except (OSError, subprocess.SubprocessError) as error:
            print(view, target, error, file=sys.stderr, flush=True)
            os._exit(100 + (getattr(error, "errno", 0) or 0))
    os.close(reading)
    if login is not None:
        approve(pid, login, program)
    os.close(writing)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def become(login: int) -> None:
    """A process of the user, as after a login."""
    write("/proc/self/loginuid", str(login))
    os.setgid(login)
    os.setuid(login)
    libc.prctl(PR_SET_DUMPABLE, 1)  # or its files in /proc are root's


def approve(pid: int, login: int, program: str) -> None:
    """As the agent, through this process's eyes: the other one sees other files by now, or will in a moment."""
    from persona_guest.kernel.task import Task
    from persona_guest.program import exec_request as exec_requests

    identifier, layer = agent()
    path, descriptor = os.fsencode(program), os.open(program, os.O_PATH)
    attempt = exec_requests.request_for(Task(os.getpid()), descriptor, path, (path,), identifier)
    layer.approve(pid, login, attempt, script=0 if attempt.stages[0].is_script else None)


@functools.cache
def agent() -> Any:
    """What of an agent it takes, which only root may have."""
    from persona_guest import settings
    from persona_guest.lsm.layer import AttachedLayer
    from persona_guest.program.identity import Identifier

    found = settings.Settings()
    return Identifier(found.gate), AttachedLayer(found.paths.bpf_dir)


if __name__ == "__main__":
    login = int(sys.argv[1]) if len(sys.argv) > 1 else None
    # not a path: that leads elsewhere in some views
    os.dup2(os.open(os.environ["RAN"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 9)
    for number, line in enumerate(sys.stdin):
        os.environ["MARK"] = f"{number} "
        view, target, other, started, program = line.split()
        print(start(view, target, other, started, program, login), flush=True)
