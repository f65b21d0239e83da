"""What well-known programs can do beyond their own purpose: facts for warnings, never for decisions.

A whitelist decides which programs start.  It cannot decide what a program does once it runs, and some are
made to do whatever their user says.  ``persona-broker check`` and ``apply`` warn about entries that allow
one.  A program that is not here may be as powerful: the list is what people meet most, not all there is.
Names are those of Debian's packages.
"""

import re
from collections.abc import Mapping
from enum import StrEnum

from persona.patterns import LOADER_NAME


class Kind(StrEnum):
    """What a program can do for its user, the most powerful first."""

    LOADS = "loads_programs"  # runs other programs in its own process: no exec, so the gate is not asked
    CODE = "runs_code"  # runs any code that its user writes, in its own process
    STARTS = "starts_programs"  # starts any program that its user names; the gate decides each of them
    WRITES = "writes_files"  # writes any file that its user may write
    READS = "reads_files"  # shows any file that its user may read


_L, _C, _S, _W, _R = Kind

_LISTS: Mapping[tuple[Kind, ...], str] = {
    # --- run foreign programs without an exec: by an own ELF loader, by translation, as a machine -------
    (_L,): """
        ld.so valgrind valgrind.bin proot rr drrun pin wine wine64 box64 box86 FEXInterpreter FEXLoader runsc
        sde sde64 linux.uml qemu-i386 qemu-x86_64 qemu-x86_64-static qemu-aarch64 qemu-aarch64-static qemu-arm
        qemu-arm-static qemu-riscv64 qemu-riscv64-static""",
    # --- languages, shells and programs with a language inside -----------------------------------------
    (_C, _S, _W, _R): """
        sh bash rbash dash ash zsh ksh ksh93 mksh fish tcsh csh rc es yash elvish nu pwsh busybox toybox
        python pypy ipython jupyter perl perldoc ruby irb lua luajit texlua node nodejs deno bun npm npx yarn
        php phpdbg tclsh wish expect guile gsi racket sbcl clisp ecl emacs emacs-nox emacs-gtk emacsclient
        awk gawk mawk nawk original-awk R Rscript julia octave octave-cli maxima gp sage java jshell jrunscript jjs
        mono mono-sgen csharp dotnet erl iex elixir escript ghci runghc ocaml scala groovy kotlin swift go cargo
        vi vim vimdiff view rvim rview ex nvim vim.basic vim.tiny vim.nox vim.gtk vim.gtk3 kak
        gdb gdbtui lldb make gmake ninja cmake ctest meson scons rake gradle mvn ant bazel just
        gcc g++ cc c++ clang clang++ tcc ld ld.bfd ld.gold ld.lld as gnuplot sqlite3 psql openssl
        nmap ansible ansible-playbook puppet salt-call pip pipx uv cpan gem bundle composer apt apt-get aptitude dpkg
        docker podman buildah nerdctl ctr crictl lxc lxc-start machinectl virsh
        tex pdftex latex pdflatex xelatex lualatex luatex gs ghostscript
        pytest ptpython code-server weechat irssi mutt neomutt hexchat screen tmux byobu dvtm mc""",
    (_C, _W, _R): "jq yq gojq m4 cpp bc bpftrace",
    (_C, _S): "crash stap bpftool",
    (_C,): """
        qemu-system-i386 qemu-system-x86_64 qemu-system-aarch64 qemu-system-arm qemu-system-riscv64 kvm
        VBoxHeadless bochs""",
    # --- start what they are told to --------------------------------------------------------------------
    (_S, _W, _R): """
        find fd fdfind tar bsdtar zip rsync scp sftp ssh git hg svn cvs bzr sed ed red mg jed ne nano pico
        joe jmacs jstar rjoe jpico mcedit micro hx sort split csplit cpio pax 7z 7za 7zr
        wget curl aria2c lftp ftp tftp ncftp socat nc netcat ncat nc.traditional nc.openbsd telnet
        mysql mariadb mongosh redis-cli sqlplus isql tcpdump tshark dumpcap crontab systemctl dpkg-deb rpm
        gpg gpg2 restic borg duplicity rdiff-backup script mysqldump pg_dump pg_dumpall debugfs""",
    (_S, _R): """
        less more most pg man info pinfo bat batcat lesspipe w3m lynx links elinks links2 journalctl
        zless zmore xzless lzless run-mailcap see mail mailx bsd-mailx s-nail dmesg dc""",
    (_S, _W): "install logrotate at batch strace ltrace perf",
    (_S,): """
        env xargs parallel nice ionice chrt taskset numactl prlimit nohup setsid setarch linux32 linux64 timeout
        time watch stdbuf unbuffer rlwrap flock choom cpulimit chroot schroot unshare nsenter bwrap firejail
        fakeroot fakechroot eatmydata sudo sudoedit su runuser sg newgrp doas pkexec capsh setpriv start-stop-daemon
        run-parts systemd-run systemd-nspawn systemd-inhibit dbus-run-session dbus-launch gosu tini dumb-init daemon
        ip ssh-agent ssh-add sshpass autossh mosh ttyd x-terminal-emulator xterm xdg-open run-one entr
        inotifywait exim4 sendmail tcpserver xinetd""",
    # --- files ------------------------------------------------------------------------------------------
    (_W, _R): """
        cp mv dd tee ln rename shred patch gzip gunzip bzip2 bunzip2 xz unxz zstd lz4 lzop unzip ar gcore objcopy
        strip xxd iconv dos2unix unix2dos sponge uuencode uudecode ffmpeg convert magick xmllint xsltproc pandoc
        soffice rclone xorriso mkisofs genisoimage mcopy sshfs""",
    (_W,): "truncate chmod chown chgrp setfacl chattr mkfifo mknod rm rmdir unlink fallocate touch",
    (_R,): """
        cat tac nl head tail od hd hexdump strings base32 base64 basenc cut paste column fold fmt pr expand unexpand
        grep egrep fgrep zgrep rgrep rg ag ack look uniq comm join diff diff3 sdiff cmp colordiff wdiff zdiff zcat
        bzcat xzcat zstdcat shuf rev ul tsort ptx highlight pygmentize troff groff nroff readelf objdump pdftotext
        antiword catdoc aspell""",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _kinds() -> dict[str, frozenset[Kind]]:
    found: dict[str, frozenset[Kind]] = {}
    for kinds, names in _LISTS.items():
        for name in names.split():
            found[name] = found.get(name, frozenset()) | frozenset(kinds)
    return found


PROGRAMS: Mapping[str, frozenset[Kind]] = _kinds()

# Programs whose user goes on giving orders while they run, whatever the command line was.
INTERACTIVE = _words("""
    vi vim vimdiff view rvim rview ex nvim vim.basic vim.tiny vim.nox vim.gtk3 emacs emacs-nox nano pico joe mcedit mc
    ed red less more most man info w3m lynx links elinks gdb lldb sqlite3 psql mysql mariadb ftp lftp sftp ssh telnet
    screen tmux byobu su sudo mutt mail mailx dc bc debugfs journalctl systemctl crontab""")

# The same where the command line names no script, but options only.
PROMPTS = _words("""
    sh bash rbash dash ash zsh ksh fish tcsh csh python pypy ipython irb lua node nodejs php tclsh wish expect guile""")

# An option of programs with commands (git push), which may stand before the command and changes nothing.
BEFORE_COMMANDS: Mapping[str, str] = {
    "git": "-C .", "systemctl": "--no-pager", "journalctl": "-q", "loginctl": "--no-pager", "machinectl": "-q",
    "docker": "-D", "podman": "--noout", "kubectl": "-v=0", "apt": "-q", "apt-get": "-q", "ip": "-s", "npm": "-s",
    "pip": "-q", "virsh": "-q", "svn": "-q", "hg": "-q", "nmcli": "-t", "resolvectl": "--no-pager",
}  # fmt: skip

# The long form of short options that people fix in a pattern, and what GNU's and others' programs take for the same.
LONG_FORMS: Mapping[tuple[str, str], str] = {
    ("psql", "-h"): "--host", ("psql", "-d"): "--dbname", ("psql", "-U"): "--username", ("psql", "-p"): "--port",
    ("mysql", "-h"): "--host", ("mysql", "-u"): "--user", ("mariadb", "-h"): "--host", ("mariadb", "-u"): "--user",
    ("curl", "-o"): "--output", ("curl", "-T"): "--upload-file", ("curl", "-K"): "--config", ("curl", "-d"): "--data",
    ("wget", "-O"): "--output-document", ("rsync", "-e"): "--rsh", ("tar", "-f"): "--file",
    ("tar", "-C"): "--directory",
    ("tar", "-I"): "--use-compress-program", ("journalctl", "-u"): "--unit", ("journalctl", "-D"): "--directory",
    ("systemctl", "-H"): "--host", ("systemctl", "-M"): "--machine", ("sudo", "-u"): "--user", ("grep", "-f"): "--file",
    ("sort", "-o"): "--output", ("sed", "-i"): "--in-place", ("docker", "-H"): "--host", ("su", "-c"): "--command",
}  # fmt: skip

# Where those that are not in /usr/bin are.
IN_SBIN = _words("""
    chroot debugfs ip bpftool crash stap tcpdump logrotate xinetd tcpserver runuser exim4 sendmail
    start-stop-daemon""")

_QEMU_USER = re.compile(r"qemu-(?!system-|img$|io$|nbd$|ga$|storage-daemon$)[a-z0-9_]+(?:-static)?(?:-binfmt-P)?")
_TRIPLE = re.compile(r"[a-z0-9_]+-linux-(?:gnu|musl)[a-z0-9_]*-")
_VERSION = re.compile(r"-?\d+(?:[.-]\d+)*(?:-static)?")


def plain_name(name: str) -> str:
    """The name under which a program is listed: ``python3.11`` is ``python``, ``gcc-12`` is ``gcc``."""
    if LOADER_NAME.fullmatch(name):
        return "ld.so"
    name = _TRIPLE.sub("", name, count=1)
    if name in PROGRAMS:
        return name
    for found in _VERSION.finditer(name):
        if found.end() == len(name) and name[: found.start()] in PROGRAMS:
            return name[: found.start()]
    return name


def kinds_of(name: str) -> frozenset[Kind]:
    """What a program of this bare name is known for; empty where nothing is known."""
    if _QEMU_USER.fullmatch(name):
        return frozenset({Kind.LOADS})
    return PROGRAMS.get(plain_name(name), frozenset())


# What bash, dash, zsh and fish do themselves, so that no program starts; not what Debian has as a program, too (echo,
# kill, printf, pwd, test, ...).
BUILTINS = frozenset(
    ["alias", "bg", "bind", "break", "builtin", "case", "cd", "command", "compgen", "complete", "compopt", "continue",
     "declare", "dirs", "disown", "enable", "eval", "exec", "exit", "export", "fc", "fg", "for", "function", "getopts",
     "hash", "history", "if", "jobs", "let", "local", "logout", "mapfile", "popd", "pushd", "read", "readarray",
     "readonly", "return", "set", "shift", "shopt", "source", "suspend", "times", "trap", "type", "typeset", "ulimit",
     "umask", "unalias", "unset", "until", "wait", "while"]
)  # fmt: skip
