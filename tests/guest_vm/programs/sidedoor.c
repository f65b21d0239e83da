/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sidedoor UID DIRECTORY: tries every way to start a program that it knows, and prints a line a way: its
 * name, then "ran" or "stopped".  UID is the user to become first, where it is started as root; or "-".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *directory;
static char *none[] = { 0 };
#define TRUE "/usr/bin/true"
#define STOPPED 200

static int program(const char *path)
{
	char *args[] = { (char *)path, 0 };
	execve(path, args, none);
	return errno;
}

static int plain(void) { return program(TRUE); }
static int setuid_program(void) { return program("/usr/bin/su"); }
static int shell(void) { return program("/bin/bash"); }
static int itself(void) { return program("/proc/self/exe"); }

static int by_descriptor(void)
{
	char *args[] = { "true", 0 };
	int fd = open(TRUE, O_PATH);
	syscall(SYS_execveat, fd, "", args, none, AT_EMPTY_PATH);
	return errno;
}

static int loader(void)
{
	char *args[] = { "ld.so", TRUE, 0 };
	execve("/lib64/ld-linux-x86-64.so.2", args, none);
	return errno;
}

static int copy_to(int out)
{
	char data[65536];
	ssize_t size;
	int in = open(TRUE, O_RDONLY);
	while ((size = read(in, data, sizeof(data))) > 0)
		if (write(out, data, (size_t)size) != size)
			return -1;
	return close(in);
}

static int memory_file(void)
{
	char *args[] = { "true", 0 };
	int fd = memfd_create("x", 0);
	copy_to(fd);
	syscall(SYS_execveat, fd, "", args, none, AT_EMPTY_PATH);
	return errno;
}

static int unlinked(void)
{
	char path[128], proc[64], *args[] = { "true", 0 };
	snprintf(path, sizeof(path), "%s/copy", directory);
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0755);
	copy_to(fd);
	close(fd);
	fd = open(path, O_PATH);
	unlink(path);
	snprintf(proc, sizeof(proc), "/proc/self/fd/%d", fd);
	execve(proc, args, none);
	return errno;
}

static int script(void)
{
	char path[128];
	snprintf(path, sizeof(path), "%s/script", directory);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0755);
	dprintf(fd, "#!/bin/sh\nexit 0\n");
	close(fd);
	return program(path);
}

static int no_new_privs(void)
{
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	return program(TRUE);
}

static int user_namespace(void)
{
	if (unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID) != 0)
		return -errno;
	pid_t pid = fork();
	if (pid == 0)
		_exit(program(TRUE));
	int status;
	waitpid(pid, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void *in_thread(void *result)
{
	*(int *)result = program(TRUE);
	return 0;
}

static int thread(void)
{
	pthread_t id;
	int result = -1;
	pthread_create(&id, 0, in_thread, &result);
	pthread_join(id, 0);
	return result;
}

static int traced(void)
{
	pid_t pid = fork();
	int status;
	if (pid == 0) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		_exit(program(TRUE));
	}
	waitpid(pid, &status, 0);
	while (!WIFEXITED(status) && !WIFSIGNALED(status)) {
		ptrace(PTRACE_CONT, pid, 0, 0);
		waitpid(pid, &status, 0);
	}
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int compat(void)
{
	static const char path[] = TRUE;
	char *low = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	unsigned *args = (unsigned *)(low + 1024);
	long result;
	strcpy(low, path);
	args[0] = (unsigned)(unsigned long)low;
	args[1] = 0;
	__asm__ volatile("int $0x80" : "=a"(result) : "0"(11L), "b"(low), "c"(args), "d"(args + 1) : "memory");
	return (int)-result;
}

/* A listener of one's own, which answers "go on". */
static int listener;

static void *answer(void *unused)
{
	struct seccomp_notif request;
	struct seccomp_notif_resp response;
	for (;;) {
		memset(&request, 0, sizeof(request));
		memset(&response, 0, sizeof(response));
		if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &request) != 0)
			return unused;
		response.id = request.id;
		response.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
		ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response);
	}
}

static int own_listener(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_execve, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = { 4, code };
	pthread_t id;
	int status;
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &filter);
	if (listener < 0)
		return -errno;
	pthread_create(&id, 0, answer, 0);
	pid_t pid = fork();
	if (pid == 0)
		_exit(program(TRUE));
	waitpid(pid, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static const struct {
	const char *name;
	int (*go)(void);
} ways[] = {
	{ "plain", plain }, { "shell", shell }, { "setuid", setuid_program }, { "self", itself },
	{ "execveat", by_descriptor }, { "ld.so", loader }, { "memfd", memory_file }, { "unlinked", unlinked },
	{ "script", script }, { "no_new_privs", no_new_privs }, { "userns", user_namespace }, { "thread", thread },
	{ "ptrace", traced }, { "int80", compat }, { "own_listener", own_listener },
};

int main(int argc, char **argv)
{
	if (argc == 1) /* started as /proc/self/exe */
		return 0;
	int null = open("/dev/null", O_RDWR);
	uid_t uid = (uid_t)atoi(argv[1]);
	directory = argv[2];
	if (strcmp(argv[1], "-") != 0 && (setgroups(0, 0) || setresgid(uid, uid, uid) || setresuid(uid, uid, uid)))
		return 2;
	prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
	for (unsigned i = 0; i < sizeof(ways) / sizeof(*ways); i++) {
		int status;
		fflush(stdout);
		pid_t pid = fork();
		if (pid == 0) {
			int out = dup(1);
			dup2(null, 0);
			dup2(null, 1);
			dup2(null, 2);
			fcntl(out, F_SETFD, FD_CLOEXEC);
			_exit(ways[i].go() ? STOPPED : 0); /* returns only where nothing started in this process */
		}
		waitpid(pid, &status, 0);
		printf("%s %s\n", ways[i].name,
		       WIFEXITED(status) && WEXITSTATUS(status) == STOPPED ? "stopped" :
		       WIFEXITED(status) ? "ran" : "killed");
	}
	return 0;
}
