/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/*
 * A file that whoever starts the agent writes anew while it gets on: which process it is, and a number that changes
 * (persona_guest/system/start_progress.py).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "starting.h"

bool is_starting(const struct options *options, struct progress *seen)
{
	char text[PROGRESS_MAX + 1];
	bool first = !seen->known;
	ssize_t size;
	int fd = open(options->starting, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);

	seen->known = true; /* what is there at first may be left of one that was killed */
	if (fd < 0)
		return false;
	size = read(fd, text, PROGRESS_MAX);
	close(fd);
	if (size <= 0)
		return false;
	text[size] = '\0';
	if (strcmp(text, seen->text) == 0)
		return false;
	memcpy(seen->text, text, sizeof(text));
	if (first)
		return false;
	text[strcspn(text, " ")] = '\0';
	if (strcmp(text, "kernel") == 0) /* its layer is being loaded, which comes before a start */
		return true;
	if (seen->starter[0] == '\0')
		memcpy(seen->starter, text, sizeof(text));
	return strcmp(seen->starter, text) == 0;
}
