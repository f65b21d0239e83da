"""The gate itself, on this machine's kernel: what starts, what does not, and what it is called."""

import json
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.guest.conftest import ROOT, Run


def test_what_is_listed_runs_and_what_is_not_does_not(gated: Run) -> None:
    done = gated("ls -d /; strace -V; echo $?; ls -d /etc | cat")
    assert done.stdout == "/\n126\n/etc\n"
    assert "persona: strace: denied, no_matching_policy under persona Trial, policy trial-Trial (" in done.stderr


def test_exit_codes_are_the_commands_own(gated: Run) -> None:
    assert gated("exit 7").returncode == 7
    assert gated("kill -TERM $$").returncode == 128 + 15


TRICKS = {
    "copy": "cp /usr/bin/strace ./ls; ./ls -V",
    "rename": "cp /usr/bin/strace ls; mkdir d; mv ls d/ls; PATH=$PWD/d:$PATH ls -V",
    "symlink": "ln -s /usr/bin/strace ls; ./ls -V",
    "hard link": "ln /usr/bin/strace ls && ./ls -V",
    "argv0": "(exec -a ls /usr/bin/strace -V)",
    "ld.so": "/lib64/ld-linux-x86-64.so.2 /usr/bin/strace -V",
    "busybox": "busybox ls /",
    "fd": "exec 5</usr/bin/strace; /proc/self/fd/5 -V; /dev/fd/5 -V",
    "other's fd": "exec 5</usr/bin/strace; /proc/$$/fd/5 -V",
    "shebang": "printf '#!/usr/bin/strace -V\\n' >x; chmod +x x; ./x",
    "shebang chain": "printf '#!/usr/bin/strace -V\\n' >x; chmod +x x; printf '#!%s/x\\n' $PWD >y; chmod +x y; ./y",
    "relative": "cd /usr/bin; ./strace -V; ../bin/strace -V; ../../usr/bin/strace -V",
    "find -exec": "find / -maxdepth 0 -exec strace -V ';'",
    "env": "env strace -V; env -S 'strace -V'",
    "perl": "perl -e 'exec \"strace\", \"-V\"'",
    "python3": "python3 -c 'import os; os.execvp(\"strace\", [\"strace\", \"-V\"])'",
    "posix_spawn": "python3 -c 'import os; os.posix_spawn(\"/usr/bin/strace\", [\"strace\", \"-V\"], {})'",
    "memfd": "python3 -c 'import os; f = os.memfd_create(\"x\", 0); "
    "os.write(f, open(\"/usr/bin/strace\", \"rb\").read()); os.execve(f, [\"strace\", \"-V\"], {})'",
    "unlinked": "cp /usr/bin/strace x; exec 5<x; rm x; /proc/self/fd/5 -V",
    "preload": "LD_PRELOAD=/usr/bin/strace strace -V",
    "user namespace bind mount": "unshare -rm bash -c 'mount --bind /usr/bin/strace /usr/bin/true; /usr/bin/true -V'",
    "user namespace file": "cp /usr/bin/strace x; unshare -rm bash -c 'mount --bind x /usr/bin/ls; /usr/bin/ls -V'",
    "user namespace over the directory": "W=$PWD/w; mkdir -p w/d/e; ln -s /usr/bin/strace w/d/prog; cd w/d/e; "
    "export W; unshare -rm bash -c 'mount -t tmpfs none $W; mkdir -p $W/d/e; ln -s /usr/bin/true $W/d/prog; "
    "../prog -V'",
    "vfork": "python3 -c 'import subprocess; subprocess.run([\"/usr/bin/strace\", \"-V\"], close_fds=False)'",
    "background": "strace -V & wait",
    "subshell": "(strace -V); $(strace -V)",
    "own arguments": "git log; git status",
}  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks(gated: Run, trick: str) -> None:
    done = gated(TRICKS[trick])
    assert "strace -- version" not in done.stdout + done.stderr
    assert "On branch" not in done.stdout
    assert "denied" in done.stderr.lower() or "levels of symbolic links" in done.stderr, done.stderr


def test_a_second_listener_is_refused(gated: Run) -> None:
    script = (
        "import ctypes, struct; libc = ctypes.CDLL(None, use_errno=True); libc.prctl(38, 1, 0, 0, 0)\n"
        "prog = ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0x7fff0000))\n"
        "class F(ctypes.Structure): _fields_ = [('n', ctypes.c_ushort), ('p', ctypes.c_void_p)]\n"
        "print(libc.syscall(317, 1, 8, ctypes.byref(F(1, ctypes.cast(prog, ctypes.c_void_p)))), ctypes.get_errno())"
    )
    assert gated('python3 -c "$1"', script).stdout == "-1 16\n"


def test_errors_are_the_kernels_own(gated: Run) -> None:
    done = gated(
        "/nonexistent; echo $?; /etc; echo $?; printf 'echo plain text ran\\n' >t; chmod +x t; ./t; "
        'ln -s loop loop; ./loop; echo $?; python3 -c \'import os\ntry: os.execv("/usr/bin/true", ["x" * 200000])\n'
        "except OSError as e: print(e.errno)'"
    )
    assert done.stdout == "127\n126\nplain text ran\n126\n7\n"


def test_long_command_lines(gated: Run) -> None:
    counts = "1 62 63 64 65 500 1022 1023 1024 1025 5000"
    done = gated(f"for n in {counts}; do ls -d $(printf '/ %.0s' $(seq $n)) | wc -l; done")
    assert done.stdout.split() == counts.split(), done
    assert gated("ls -d /etc/$(printf '/%.0s' {1..3000}) $(printf '/%.0s' {1..100000})").returncode == 2
    assert "argv_too_long" in gated("git log $(seq 1 5000)").stderr


def test_a_script_of_five_hundred_starts(gated: Run) -> None:
    done = gated("for i in $(seq 500); do /usr/bin/true || exit 1; done; echo done")
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_two_hundred_at_once(gated: Run) -> None:
    assert gated("for i in $(seq 200); do (sleep 0.2; echo x) & done; wait").stdout.count("x") == 200


def test_nothing_is_left_behind(gated: Run, documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="left-") as scratch:  # short: socket paths have 107 characters
        monkeypatch.setenv("TMPDIR", scratch)
        assert gated("echo in", files=documents).stdout == "in\n"
        left = subprocess.run(["pgrep", "-f", scratch], capture_output=True, text=True, check=False)
        assert left.stdout == ""
        assert list(Path(scratch).iterdir()) == []


def test_bad_documents_are_named(gated: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("kind: Persona\nname: x y\ncommand_whitelist: [ls]\n")
    done = gated("true", files=tmp_path / "bad.yaml")
    assert done.returncode == 4
    assert "bad.yaml" in done.stderr


def test_thirty_two_bit_programs_are_seen(gated: Run, tmp_path: Path) -> None:
    source = tmp_path / "x.c"
    source.write_text(
        "int main(void) { long r; static unsigned a[3];\n"
        'a[0] = (unsigned)(unsigned long)"strace"; a[1] = (unsigned)(unsigned long)"-V";\n'
        '__asm__ volatile("int $0x80" : "=a"(r) : "0"(11L), "b"("/usr/bin/strace"), "c"(a), "d"(0) : "memory");\n'
        "return (int)-r; }\n"
    )
    # a static, non-PIE program has its strings below 4 GiB, where int 0x80 can see them
    subprocess.run(["cc", "-static", "-no-pie", "-o", str(tmp_path / "x"), str(source)], check=True)
    trusted = tmp_path / "persona.yaml"
    trusted.write_text(f"kind: Persona\nname: T\ncommand_whitelist: [bash, {tmp_path}/x]\n")
    free = subprocess.run([str(tmp_path / "x")], capture_output=True, text=True, check=False)
    assert "strace -- version" in free.stdout, "int 0x80 must work here, or this shows nothing"
    done = gated(f"{tmp_path}/x", files=trusted)
    assert "strace -- version" not in done.stdout


def test_the_explained_example_is_ready_in_time(gated: Run) -> None:
    example = ROOT / "examples" / "personas" / "data-analyst.yaml"
    done = gated("echo in", files=example)
    assert done.stdout == "in\n"
    assert json.dumps(done.stderr) == '""'
