"""A real libvirtd of the tests' own, with real domains, beside whatever the machine runs.

It lives in a mount and a network namespace: each directory that is compiled into it is one of the test's.  A domain is
a boot sector of a few bytes under emulation: it burns its CPU, or sleeps for ever, a second after it was started.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt

from tests.waiting import until

_DIRECTORIES = ("/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/run/libvirt")
_LIBVIRTD = """
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
# no log daemon, no security driver and no device nodes of their own: each would be one more process or mount
_QEMU = """
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
stdio_handler = "file"
namespaces = []
cgroup_controllers = ["cpu", "cpuacct"]
"""
BURN = b"\xeb\xfe"  # jmp $
SLEEP = b"\xfa\xf4\xeb\xfd"  # cli; hlt; and again
_DOMAIN = """
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid>
  <memory unit='MiB'>16</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <on_poweroff>destroy</on_poweroff><on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='hda' bus='ide'/>
    </disk>
    <memballoon model='virtio'/>
  </devices>
</domain>
"""
_PATIENCE_S = 30.0


class Libvirtd:
    """``uri`` is that of its read-only socket; ``start`` and ``kill`` as often as wanted, ``close`` in the end."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lv-", dir="/tmp"))  # a socket's path may have 107 bytes
        self.folder.chmod(0o755)
        self.uri = f"qemu+unix:///system?socket={self.folder}/run/libvirt-sock-ro"
        self._uri = f"qemu+unix:///system?socket={self.folder}/run/libvirt-sock"
        etc = self.folder / "etc"
        (etc / "libvirt").mkdir(parents=True)
        # the whole of /etc: a mount on one of its files is gone as soon as somebody on the machine replaces that file
        for name in ("passwd", "group", "nsswitch.conf", "hosts", "ld.so.cache"):
            shutil.copy(f"/etc/{name}", etc)
        for name, line in (("passwd", "libvirt-qemu:x:64055:64055::/:/bin/false"), ("group", "libvirt-qemu:x:64055:")):
            with (etc / name).open("a") as file:  # whom Debian's libvirt-daemon-system makes; libvirtd looks for them
                file.write(f"{line}\n")
        (etc / "libvirt" / "libvirtd.conf").write_text(_LIBVIRTD)
        (etc / "libvirt" / "qemu.conf").write_text(_QEMU)
        script = f"set -e\nmount --bind {etc} /etc\n"
        for directory in _DIRECTORIES:
            mine = self.folder / ("run" if directory == "/run/libvirt" else directory.strip("/").replace("/", "-"))
            mine.mkdir()
            script += f"mkdir -p {directory}; mount --bind {mine} {directory}\n"
        apart = ["unshare", "--mount", "--net", "--propagation", "private"]
        self._keeper = subprocess.Popen(
            [*apart, "sh", "-c", f"{script}echo up; exec sleep 9999"], stdout=subprocess.PIPE
        )
        assert self._keeper.stdout is not None and self._keeper.stdout.readline() == b"up\n"
        self._keeper.stdout.close()
        self._qemus: list[int] = []
        self.start()

    def start(self) -> None:
        """Begins, or begins again and finds its domains."""
        inside = ["nsenter", "--mount", "--net", f"--target={self._keeper.pid}"]
        command = ["libvirtd", "--daemon", "--pid-file", str(self.folder / "pid")]
        subprocess.run([*inside, *command], check=True, capture_output=True, timeout=_PATIENCE_S)
        until(lambda: (self.folder / "run" / "libvirt-sock-ro").exists(), _PATIENCE_S)

    @property
    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def kill(self) -> None:
        """As a crash: its domains go on."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists(), _PATIENCE_S)
        (self.folder / "pid").unlink(missing_ok=True)

    def begin(self, name: str, code: bytes) -> str:
        """Starts a domain that runs this code; its UUID."""
        disk, ident = self.folder / f"{name}.img", str(uuid.uuid4())
        disk.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(512 * 63))
        self.ask(lambda connection: connection.defineXML(_DOMAIN.format(name=name, uuid=ident, disk=disk)).create())
        self._qemus.append(self.qemu(name))
        return ident

    def destroy(self, name: str) -> None:
        """As pulling its plug; it stays defined."""
        self.ask(lambda connection: connection.lookupByName(name).destroy())

    def qemu(self, name: str) -> int:
        """The process of a domain."""
        return int((self.folder / "run" / "qemu" / f"{name}.pid").read_text())

    def ask(self, what: Callable[[Any], Any]) -> Any:
        """Over a connection that may write, which is closed again."""
        connection = libvirt.open(self._uri)
        try:
            return what(connection)
        finally:
            connection.close()

    def close(self) -> None:
        """Ends all of it."""
        for pid in self._qemus:
            command = Path(f"/proc/{pid}/cmdline")
            if command.exists() and b"qemu" in command.read_bytes():
                os.kill(pid, signal.SIGKILL)
        if (self.folder / "pid").exists():
            self.kill()
        self._keeper.kill()
        self._keeper.wait(_PATIENCE_S)
        shutil.rmtree(self.folder, ignore_errors=True)
