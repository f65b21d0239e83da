"""Ways to start a program under another name, from another place or without a name: one shell line each.

``{program}`` is the program and ``{file}`` its argument, which it creates.  Every line is run three
times: by root, who is not gated, to show that it leads somewhere; by a gated user with a program that
is not allowed; and, where the way itself is open to him (``OPEN``), with one that is.
"""

from pathlib import Path

HELPERS = Path(__file__).parent / "helpers"
LD_SO = "/lib64/ld-linux-x86-64.so.2"
_NAMESPACE = "/usr/bin/python3 /usr/local/share/namespace.py"
_PYTHON = "/usr/bin/python3 -c"

OPEN: dict[str, str] = {
    "by its name": "{program} {file}",
    "LD_PRELOAD": "RUN={program} ON={file} LD_PRELOAD=/usr/local/lib/preload.so ls",
    "LD_AUDIT": "RUN={program} ON={file} LD_AUDIT=/usr/local/lib/preload.so ls",
    "symlink": "ln -s {program} ls; ./ls {file}",
    "hard link": "/usr/local/share/links/$(basename {program}) {file}",  # root made it: the kernel protects them
    "argv[0]": "(exec -a ls {program} {file})",
    "descriptor": "exec 5<{program}; /proc/self/fd/5 {file}",
    "relative": "cd /usr/bin; ../../{program} {file}",
    "symlink to its directory": "ln -s $(dirname {program}) d; d/$(basename {program}) {file}",
    "bind mount in a user namespace": f"{_NAMESPACE} bind /usr/bin/true {{program}} {{file}}",
    "chroot": f"{_NAMESPACE} chroot {{program}} {{file}}",
    "bind mount in a chroot": f"{_NAMESPACE} chroot-bind /usr/bin/true {{program}} {{file}}",
    "32-bit program": "/usr/local/bin/program32 {program} {file}",
    "int 0x80": "/usr/local/bin/int80 {program} {file}",
    "execveat of a descriptor": "/usr/local/bin/execveat {program} {file}",
    "posix_spawn": f"{_PYTHON} 'import os; p = os.posix_spawn(\"{{program}}\", [\"ls\", \"{{file}}\"], {{{{}}}}); "
    "os.waitpid(p, 0)'",
    "a script's interpreter": "printf '#!{program}\\n' >{file}.x; chmod 755 {file}.x; {file}.x {file}; rm {file}.x",
}  # fmt: skip

# What starts here is no program of this machine that a whitelist could name, whatever it is a copy of.
CLOSED: dict[str, str] = {
    "ld.so": f"{LD_SO} {{program}} {{file}}",
    "memfd and execveat": f'{_PYTHON} \'import os; f = os.memfd_create("x", 0); '
    'os.write(f, open("{program}", "rb").read()); os.execve(f, ["ls", "{file}"], {{}})\'',
    "copy at home": "cp {program} ~/ls; ~/ls {file}",
    "copy, renamed": "cp {program} x; mv x ls; PATH=.:$PATH; ls {file}",
    "unlinked": "cp {program} x; exec 5<x; rm x; /proc/self/fd/5 {file}",
    "busybox": "busybox touch {file}",
    "busybox shell": "busybox sh -c '{program} {file}'",
    "/proc/self/exe": "/usr/local/bin/again first {file}",  # its second start is with arguments that it may not have
    "copy mounted over a name": f"cp {{program}} x; {_NAMESPACE} bind /usr/bin/true $PWD/x {{file}}",
}

C: dict[str, tuple[str, tuple[str, ...]]] = {  # name: source, compiler's options
    "program32": (
        "#include <unistd.h>\nint main(int c, char **v) { (void)c; execv(v[1], v + 1); return 126; }\n",
        ("-m32",),
    ),
    "int80": (
        # not position-independent, so that its data lies where 32 bits reach
        "#include <string.h>\nstatic char path[256], file[256]; static unsigned vector[3];\n"
        "int main(int c, char **v) { long r; (void)c; strcpy(path, v[1]); strcpy(file, v[2]);\n"
        "vector[0] = (unsigned)(unsigned long)path; vector[1] = (unsigned)(unsigned long)file;\n"
        '__asm__ volatile("int $0x80" : "=a"(r) : "0"(11L), "b"(path), "c"(vector), "d"(0L) : "memory");\n'
        "return (int)-r; }\n",
        ("-no-pie",),
    ),
    "execveat": (
        "#define _GNU_SOURCE\n#include <fcntl.h>\n#include <sys/syscall.h>\n#include <unistd.h>\n"
        'int main(int c, char **v) { char *a[] = { "ls", v[2], 0 }, *e[] = { 0 }; (void)c;\n'
        'syscall(SYS_execveat, open(v[1], O_PATH), "", a, e, AT_EMPTY_PATH); return 126; }\n',
        (),
    ),
    "again": (
        # starts itself anew under another command line, and only then does what it is for
        "#include <fcntl.h>\n#include <string.h>\n#include <unistd.h>\n"
        'int main(int c, char **v) { char *a[] = { "again", "second", v[2], 0 }, *e[] = { 0 }; (void)c;\n'
        'if (strcmp(v[1], "second") == 0) return open(v[2], O_CREAT, 0644) < 0;\n'
        'execve("/proc/self/exe", a, e); return 126; }\n',
        (),
    ),
}

PRELOAD = (
    "#include <stdlib.h>\n#include <unistd.h>\n"
    "unsigned la_version(unsigned v) { return v; }\n"
    '__attribute__((constructor)) static void start(void) { char *p = getenv("RUN"), *a[] = { p, getenv("ON"), 0 };\n'
    'unsetenv("LD_PRELOAD"); unsetenv("LD_AUDIT"); execv(p, a); _exit(126); }\n'
)
