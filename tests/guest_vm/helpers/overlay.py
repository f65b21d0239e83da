"""In the guest: overlay.py DIRECTORY starts a program that lies on an overlay of a file system that stops answering.

Whoever looks at that program waits, for as long as this process lives.  Needs no right but a user namespace.
"""

import ctypes
import os
import stat
import struct
import sys

INIT, LOOKUP, GETATTR, STATFS, OPEN, OPENDIR = 26, 1, 3, 17, 14, 27  # linux/fuse.h
FORGET, INTERRUPT, BATCH_FORGET = 2, 36, 42
NEWNS, NEWUSER = 0x00020000, 0x10000000
libc = ctypes.CDLL(None, use_errno=True)


def must(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def attributes(number: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if number == 1 else stat.S_IFREG | 0o755
    return struct.pack("=6Q10I", number, 4096, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def serve(fuse: int) -> None:
    while True:
        request = os.read(fuse, 1 << 20)
        _, opcode, unique, number = struct.unpack_from("=IIQQ", request)
        if opcode in (FORGET, INTERRUPT, BATCH_FORGET):
            continue
        error, answer = 0, b""
        if opcode == INIT:
            answer = struct.pack("=IIIIHHIIHHI7I", 7, 31, 65536, 0, 12, 9, 65536, 1, 16, 0, 0, *[0] * 7)
        elif opcode == LOOKUP:
            continue  # never
        elif opcode == GETATTR:
            answer = struct.pack("=QII", 3600, 0, 0) + attributes(number)
        elif opcode in (OPEN, OPENDIR):
            answer = struct.pack("=QII", 1, 0, 0)
        elif opcode == STATFS:
            answer = struct.pack("=5Q10I", 1000, 1000, 1000, 1000, 1000, 4096, 255, 4096, *[0] * 7)
        else:
            error = -38
        os.write(fuse, struct.pack("=IiQ", 16 + len(answer), error, unique) + answer)


base, uid, gid = sys.argv[1], os.getuid(), os.getgid()
must(libc.unshare(NEWUSER | NEWNS))
write("/proc/self/setgroups", "deny")
write("/proc/self/uid_map", f"0 {uid} 1")
write("/proc/self/gid_map", f"0 {gid} 1")
for name in ("fuse", "empty", "over"):
    os.makedirs(f"{base}/{name}", exist_ok=True)
device = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
must(libc.mount(b"silent", f"{base}/fuse".encode(), b"fuse", 0, options.encode()))
if os.fork() == 0:
    serve(device)
os.close(device)
options = f"lowerdir={base}/fuse:{base}/empty,userxattr"
must(libc.mount(b"over", f"{base}/over".encode(), b"overlay", 0, options.encode()))
print("starting", flush=True)
os.execv(f"{base}/over/program", ["program"])
