"""In the guest: namespace.py bind OVER PROGRAM FILE | chroot PROGRAM FILE | chroot-bind OVER PROGRAM FILE.

Starts PROGRAM on FILE from a mount namespace (and a user namespace, unless root calls) of its own: by the name OVER,
onto which it is mounted, or from within a chroot, or both.
"""

import ctypes
import os
import sys

MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
NEWNS, NEWUSER = 0x00020000, 0x10000000
libc = ctypes.CDLL(None, use_errno=True)


def must(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def mount(source: str, target: str, flags: int) -> None:
    must(libc.mount(source.encode(), target.encode(), None, flags, None))


how, *words = sys.argv[1:]
uid, gid = os.getuid(), os.getgid()
must(libc.unshare(NEWNS | (NEWUSER if uid else 0)))
if uid:
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"0 {uid} 1")
    write("/proc/self/gid_map", f"0 {gid} 1")
mount("none", "/", MS_REC | MS_PRIVATE)
root = ""
if how.startswith("chroot"):
    root = f"/tmp/root-{uid}"
    os.makedirs(root, exist_ok=True)
    mount("/", root, MS_BIND | MS_REC)
over = words[0]
if how != "chroot":
    mount(words[1], root + over, MS_BIND)
if root:
    os.chroot(root)
    os.chdir("/")
os.execv(over, [over, words[-1]])
