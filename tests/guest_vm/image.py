"""Makes the guest image: a stock Debian 12 with ssh, a few users and the packages of packages.txt.

Cached under a name that is a hash of everything that goes into it; never relied upon: a missing or
broken cache is rebuilt.  Needs root, mmdebstrap, e2fsprogs and qemu-utils.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
HOST_ALIAS = "persona-lab"  # what every guest is called in known_hosts, whatever its port
SIZE = "6G"  # sparse
USERS = {"alice": 1000, "bob": 1001, "carol": 1002, "deploy": 1003, "admin": 1004}
STEP_LIMIT_S = 1800
PATIENCE_S = 15
STALE_S = 7 * 86400  # an image that nobody used for so long is removed when another is made
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "ext4", "crc32c_generic", "virtio_rng")

# Run inside the new root.  Argument 1 of the hook is the root's path on the host.
_CUSTOMIZE = """
set -eu
echo analytics-1 > "$1/etc/hostname"
printf '127.0.0.1 localhost analytics-1\\n::1 localhost\\n' > "$1/etc/hosts"
printf '/dev/vda / ext4 defaults,noatime 0 1\\n' > "$1/etc/fstab"
net="$1/etc/systemd/network/lab.network"
printf '[Match]\\nName=en* eth*\\n[Network]\\nAddress=10.0.2.15/24\\nGateway=10.0.2.2\\n' > "$net"
rm -f "$1/etc/resolv.conf"; echo 'nameserver 10.0.2.3' > "$1/etc/resolv.conf"
sshd="$1/etc/ssh/sshd_config.d/lab.conf"
printf 'PasswordAuthentication no\\nUseDNS no\\nMaxStartups 200\\nMaxSessions 100\\n' > "$sshd"
chroot "$1" systemctl -q enable systemd-networkd ssh
chroot "$1" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer man-db.timer fstrim.timer \
    systemd-timesyncd.service systemd-networkd-wait-online.service getty@tty1.service e2scrub_reap.service \
    dpkg-db-backup.timer
: > "$1/etc/motd"
echo 'root:lab' | chroot "$1" chpasswd
mkdir -p "$1/etc/systemd/journald.conf.d"
printf '[Journal]\\nStorage=persistent\\nRateLimitIntervalSec=0\\n' > "$1/etc/systemd/journald.conf.d/lab.conf"
"""


@dataclass(frozen=True, slots=True)
class Image:
    """Paths of a built image: qcow2 disk, kernel, initrd, and the private ssh key of every user."""

    disk: Path
    kernel: Path
    initrd: Path
    key: Path
    known_hosts: Path


def cache_dir() -> Path:
    """Where images are kept: $PERSONA_CACHE, else ~/.cache/persona."""
    return Path(os.environ.get("PERSONA_CACHE") or Path.home() / ".cache" / "persona")


def packages() -> list[str]:
    """The package names of packages.txt."""
    lines = (HERE / "packages.txt").read_text().splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


def build() -> Image:
    """The image, from the cache or made now (about a minute).  Raises ``CalledProcessError``."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + (HERE / "packages.txt").read_bytes()).hexdigest()[:16]
    home = cache_dir() / f"image-{recipe}"
    cache_dir().mkdir(parents=True, exist_ok=True)
    with _alone():
        if not (home / "complete").exists():
            say("making the Debian 12 guest image (once; one to three minutes)")
            _clear(home)
            _make(home)
            say("the guest image is ready")
        (home / "complete").touch()  # in use
    return Image(home / "disk.qcow2", home / "vmlinuz", home / "initrd.img", home / "key", home / "known_hosts")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One builder at a time: a second one waits and then finds the image."""
    with open(cache_dir() / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process to make the guest image")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _clear(home: Path) -> None:
    """Removes what builders that were killed left, and what nobody used for long."""
    for left in cache_dir().glob("building-*"):
        # mmdebstrap's mounts live in a namespace of its own; the option is there should that change
        subprocess.run(["rm", "-rf", "--one-file-system", str(left)], check=True, timeout=300)
    for image in cache_dir().glob("image-*"):
        used = image / "complete"
        if image == home or not used.exists() or time.time() - used.stat().st_mtime > STALE_S:
            shutil.rmtree(image)


def _make(home: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="building-") as scratch:
        work = Path(scratch)
        root = work / "root"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "persona lab", "-f", str(work / "key"))
        _bootstrap(root, (work / "key.pub").read_text())
        say("writing the disk")
        shutil.copy(next(root.glob("boot/vmlinuz-*")), work / "vmlinuz")
        shutil.copy(next(root.glob("boot/initrd.img-*")), work / "initrd.img")
        host_key = (root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()
        (work / "known_hosts").write_text(f"{HOST_ALIAS} {host_key[0]} {host_key[1]}\n")
        raw = work / "disk.raw"
        run("truncate", "-s", SIZE, str(raw))
        run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,nodiscard", "-d", str(root), str(raw))
        run("qemu-img", "convert", "-O", "qcow2", str(raw), str(work / "disk.qcow2"))
        home.mkdir()
        for name in ("disk.qcow2", "vmlinuz", "initrd.img", "key", "key.pub", "known_hosts"):
            shutil.move(work / name, home / name)


def _bootstrap(root: Path, public_key: str) -> None:
    modules = "\\n".join(MODULES)
    hooks = [
        'mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"',
        'printf "MODULES=list\\nCOMPRESS=zstd\\n" > "$1/etc/initramfs-tools/conf.d/lab"',
        f'printf "{modules}\\n" > "$1/usr/share/initramfs-tools/modules.d/lab"',
    ]
    argv = ["mmdebstrap", "--quiet", "--variant=minbase", "--skip=cleanup/apt/lists"]
    argv += ["--aptopt=Apt::Install-Recommends false", "--dpkgopt=path-exclude=/usr/share/locale/*"]
    argv += [f"--essential-hook={hook}" for hook in hooks]
    argv += [f"--include={','.join(packages())}", f"--customize-hook={_CUSTOMIZE}"]
    for user, uid in USERS.items():
        argv.append(f'--customize-hook=chroot "$1" useradd -m -u {uid} -s /bin/bash {user}')
    for home in ("root", *(f"home/{user}" for user in USERS)):
        owner = home.partition("/")[2] or "root"
        argv.append(
            f'--customize-hook=mkdir -p -m 700 "$1/{home}/.ssh"; printf %s\\\\n "{public_key.strip()}" >'
            f' "$1/{home}/.ssh/authorized_keys"; chroot "$1" chown -R {owner}: /{home}/.ssh'
        )
    run(*argv, "bookworm", str(root))


def run(*argv: str) -> None:
    """Runs a command whose output is only of interest when it fails; says every 15 s that it goes on."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            for _ in range(STEP_LIMIT_S // PATIENCE_S):
                try:
                    code = process.wait(PATIENCE_S)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  {argv[0]} is at work")
            else:
                raise subprocess.TimeoutExpired(argv[0], STEP_LIMIT_S)
        finally:
            process.terminate()  # mmdebstrap undoes its mounts when it is asked to end
            process.wait(60)
        if code:
            log.seek(0)
            sys.stderr.write(log.read()[-8000:])
            raise subprocess.CalledProcessError(code, argv[0])


_STARTED = float(os.environ.get("PERSONA_STARTED") or time.time())  # the scripts hand theirs on


def say(what: str) -> None:
    """A line of progress with the seconds since the start."""
    print(f"[{time.time() - _STARTED:4.0f} s] {what}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is ended and removed
    print(build().disk)
