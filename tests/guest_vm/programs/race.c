/* SPDX-License-Identifier: Apache-2.0 */
/*
 * race WHO WHAT TRIES SECONDS DIRECTORY: executes an allowed program again and again while somebody else
 * swaps its path or its argument for one that is not allowed.
 *
 * WHO:  shared  a thread of the parent writes into memory that is shared with the child
 *       thread  a second thread of the very process that executes
 *       writev  the parent writes into the child with process_vm_writev(2)
 *       fault   nobody writes: the page is missing at each reading, and userfaultfd(2) delivers another one
 *               every second time; needs vm.unprivileged_userfaultfd=1
 * WHAT: path    true becomes /usr/local/bin/forbidden, which creates DIRECTORY/ran-N
 *       argv    marked, which creates the file that it is given, is given wrong-N instead of right-N
 *
 * Prints how often it called execve.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SIZE 128

static volatile struct {
	int number, calls;
	pid_t child;
} *with; /* shared */
static char *target; /* the path or the argument */
static char private[SIZE];
static const char *directory;
static int path, writing;

static void text(int good, char *out)
{
	memset(out, 0, SIZE);
	if (path)
		strcpy(out, good ? "/usr/bin/true" : "/usr/local/bin/forbidden");
	else
		snprintf(out, SIZE, "%s/%s-%d", directory, good ? "right" : "wrong", with->number);
}

/* Mostly asleep, so that the others have both CPUs: what lies between the two readings takes milliseconds here. */
static void pause_at_random(unsigned *seed)
{
	if (with->number % 8)
		usleep((useconds_t)rand_r(seed) % 2000);
	else
		for (volatile int i = 0, n = rand_r(seed) % 4000; i < n; i++)
			;
	__asm__ volatile("" ::: "memory");
}

static void *flip(void *unused)
{
	unsigned seed = (unsigned)getpid();
	char now[SIZE];

	for (;;) {
		for (int good = 0; good < 2; good++) {
			struct iovec from = { now, SIZE }, to = { target, SIZE };
			text(good, now);
			if (!writing)
				memcpy(target, now, SIZE);
			else if (with->child > 0)
				process_vm_writev(with->child, &from, 1, &to, 1, 0);
			pause_at_random(&seed);
		}
	}
	return unused;
}

/* Every second reader of the page gets the wrong one: the agent reads before the kernel does. */
static int faults;

static void *deliver(void *unused)
{
	static char page[4096];
	struct uffd_msg message;

	for (int good = 1; read(faults, &message, sizeof(message)) == sizeof(message); good = !good) {
		struct uffdio_copy copy = { (unsigned long)target, (unsigned long)page, 4096, 0, 0 };
		text(good, page);
		ioctl(faults, UFFDIO_COPY, &copy);
		usleep(1000);
		madvise(target, 4096, MADV_DONTNEED);
	}
	return unused;
}

static void expect_faults(void)
{
	struct uffdio_api api = { UFFD_API, 0, 0 };
	pthread_t thread;

	target = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_register range = { { (unsigned long)target, 4096 }, UFFDIO_REGISTER_MODE_MISSING, 0 };
	faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	if (faults < 0 || ioctl(faults, UFFDIO_API, &api) || ioctl(faults, UFFDIO_REGISTER, &range))
		_exit(3);
	pthread_create(&thread, 0, deliver, 0);
}

static void run(void)
{
	char file[SIZE], *args[] = { "marked", target, 0 }, *none[] = { 0 };

	snprintf(file, SIZE, "%s/ran-%d", directory, with->number);
	if (path)
		args[1] = file;
	for (int i = 0; i < 3; i++) {
		with->calls++;
		execve(path ? target : "/usr/local/bin/marked", args, none);
	}
	_exit(1);
}

int main(int argc, char **argv)
{
	struct timespec begin, now;
	pthread_t thread;
	int own = argc == 6 && strcmp(argv[1], "thread") == 0, fault = argc == 6 && strcmp(argv[1], "fault") == 0;

	if (argc != 6)
		return 2;
	path = strcmp(argv[2], "path") == 0;
	writing = strcmp(argv[1], "writev") == 0;
	directory = argv[5];
	with = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	target = writing ? private : (char *)with + 1024;
	text(1, target);
	if (!own && !fault)
		pthread_create(&thread, 0, flip, 0);
	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (with->number = 0; with->calls < atoi(argv[3]); with->number++) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec - begin.tv_sec >= atoi(argv[4]))
			break;
		if (own || writing)
			text(1, target);
		pid_t pid = fork();
		if (pid == 0) {
			if (own)
				pthread_create(&thread, 0, flip, 0);
			if (fault)
				expect_faults();
			run();
		}
		with->child = pid;
		waitpid(pid, 0, 0);
		with->child = 0;
	}
	printf("%d\n", with->calls);
	return 0;
}
