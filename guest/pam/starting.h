/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* Whether the agent, which does not answer yet, is starting and makes progress. */
#ifndef PERSONA_STARTING_H
#define PERSONA_STARTING_H

#include <stdbool.h>

#include "settings.h"

#define PROGRESS_MAX 32

/* What has been seen of one start; all zero at first. */
struct progress {
	bool known;
	char text[PROGRESS_MAX + 1]; /* the file as it was last */
	char starter[PROGRESS_MAX + 1]; /* the process that starts */
};

/*
 * Whether a start of the agent has made progress since the last call: the file ``options->starting`` has another text.
 * Only the first start that is seen counts: what ended and began again is no progress.
 */
bool is_starting(const struct options *options, struct progress *seen);

#endif
