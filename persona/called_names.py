"""Files that are several programs: which one runs is decided by the name by which the file is called, ``argv[0]``.

``pgrep`` and ``pkill`` are one file on Debian, and so are ``systemctl`` and ``reboot``.  A file that has several names
counts as several programs unless it is known here that it does the same under each of them; some are several
programs even where a machine has only one of the names.  Facts for decisions and for warnings; no I/O.
"""

import re
from collections.abc import Collection, Iterable, Mapping


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Each line: names of one file on Debian, of which argv[0] selects what it does.  A file with one of these names is
# several programs, whatever else it is called on a machine.  The first name is what people call the whole.
FAMILIES: tuple[tuple[str, ...], ...] = tuple(
    tuple(line.split())
    for line in """
        busybox
        toybox
        coreutils
        pgrep pkill pidwait
        sudo sudoedit
        kmod depmod insmod lsmod modinfo modprobe rmmod
        systemctl halt poweroff reboot runlevel shutdown telinit
        systemd-mount systemd-umount
        bash rbash
        zsh rzsh
        ksh93 rksh93
        mksh rmksh
        vim vi view vimdiff rview rvim ex vim.basic vim.tiny vim.nox vim.gtk3 vim.athena
        nvi nex nview
        nano rnano
        git git-receive-pack git-upload-pack git-upload-archive
        xz unxz xzcat lzma unlzma lzcat
        zstd unzstd zstdcat zstdmt
        lz4 lz4c lz4cat unlz4
        bzip2 bunzip2 bzcat
        gunzip uncompress
        gzip
        unzip zipinfo
        openssl
        rclone mount.rclone rclonefs
        perf
        udevadm
        resolvectl systemd-resolve
        snap
        k3s
        minikube
        more page
        joe jmacs jpico jstar rjoe
        lld ld.lld ld64.lld lld-link wasm-ld
        newgrp sg
        vipw vigr
        cppw cpgr
        adduser addgroup
        deluser delgroup
        skill snice
        killall5 pidof
        last lastb
        hostname dnsdomainname domainname nisdomainname ypdomainname
        setarch linux32 linux64 i386 x86_64
        dmsetup dmstats
        dumpe2fs e2mmpstatus
        tune2fs e2label
        e2fsck fsck.ext2 fsck.ext3 fsck.ext4
        mke2fs mkfs.ext2 mkfs.ext3 mkfs.ext4
        xtables-nft-multi iptables iptables-nft iptables-save iptables-restore ip6tables ip6tables-nft
        xtables-legacy-multi iptables-legacy ip6tables-legacy
        lvm lvchange lvcreate lvremove lvresize pvcreate pvremove vgchange vgcreate vgremove
        mtools mcopy mdel mdir mtype
        ctags etags
        pg_wrapper psql pg_dump pg_dumpall createdb dropdb createuser dropuser
    """.strip().splitlines()
)

_BY_NAME: Mapping[str, tuple[str, ...]] = {name: family for family in FAMILIES for name in family}

# Names that Debian gives one file, which does the same under each of them; by what their manual pages say.
_SAME: Mapping[str, str] = {
    name: line.split()[0]
    for line in """
        mawk awk nawk gawk original-awk
        less pager
        node nodejs
        ssh slogin
        gcc cc
        g++ c++
        ld.bfd ld
        ld.gold gold
        make gmake
        nc.openbsd nc netcat nc.traditional
        which.debianutils which
        tbl gtbl
        eqn geqn
        pic gpic
        agetty getty
        fakeroot-sysv fakeroot fakeroot-tcp
        rmt-tar rmt
        md5sum.textutils md5sum
        pinentry-curses pinentry
        pkgconf pkg-config
        telnet.netkit telnet
        w.procps w
        write.ul write
        traceroute.db traceroute
        mt-gnu mt
        gunicorn gunicorn3
        mariadb mysql
        mariadb-dump mysqldump
        mariadb-admin mysqladmin
        add-apt-repository apt-add-repository
    """.strip().splitlines()
    for name in line.split()
}

_TRIPLE = re.compile(r"[a-z0-9_]+-linux-(?:gnu|musl)[a-z0-9_]*-")
_VERSION = re.compile(r"[.-]?\d+(?:\.\d+)*")


def by_name(names: Collection[str], file: str) -> bool:
    """Whether ``argv[0]`` says which program a file is: ``names`` on the secure path, ``file`` its own name.

    Not where the names differ only by a version (``python3``, ``python3.11``) or by the machine in front
    (``x86_64-linux-gnu-gcc``), or are known to be names of one program.
    """
    if file in _BY_NAME or any(name in _BY_NAME for name in names):
        return True
    plain = {_SAME.get(name, name) for name in (_TRIPLE.sub("", name, count=1) for name in names)}
    if len(plain) < 2:
        return False
    shortest = min(plain, key=len)
    return not all(
        name == shortest or (name.startswith(shortest) and _VERSION.fullmatch(name, len(shortest))) for name in plain
    )


def siblings(name: str) -> tuple[str, ...]:
    """The other names of the file that has this one, where they are known to be other programs."""
    return tuple(other for other in _BY_NAME.get(name, ()) if other != name)


# Programs of which login(1) and others begin argv[0] with a dash, to say that this is the login's own shell.
_SHELLS = _words("sh bash rbash dash ash ksh ksh93 rksh93 mksh rmksh zsh rzsh fish tcsh csh yash")


def called_name(called: str) -> str:
    """The name in an ``argv[0]`` or in a script's path: the last part, of a shell without the dash of a login.

    A path that ends with a slash has none, and is the empty text.
    """
    name = called.rpartition("/")[2]
    return name[1:] if name.startswith("-") and name[1:] in _SHELLS else name


def listed(names: Iterable[str]) -> str:
    """A few names for a sentence."""
    names = list(names)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
