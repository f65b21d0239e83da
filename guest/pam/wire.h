/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/*
 * The packets between the PAM module and the agent (docs/protocol.md).  Every wait has a deadline, in
 * milliseconds of CLOCK_MONOTONIC; what fails says why in errno.
 */
#ifndef PERSONA_WIRE_H
#define PERSONA_WIRE_H

#include <linux/filter.h>
#include <stdbool.h>
#include <stdint.h>

#define STRING_MAX 255
#define GROUPS_MAX 128
#define FILTER_MAX 64

enum op { OP_ACCOUNT = 1, OP_OPEN = 2, OP_LISTENER = 3, OP_PRESENT = 4 };
enum verdict { VERDICT_PASS = 0, VERDICT_GATE = 1, VERDICT_DENY = 2, VERDICT_DONE = 3 };

/* Who wants a session, and how. */
struct caller {
	uint32_t uid;
	const char *service, *user, *remote, *shell;
	unsigned int group_count;
	const char (*groups)[STRING_MAX + 1];
};

struct reply {
	enum verdict verdict;
	unsigned short filter_count;
	struct sock_filter filter[FILTER_MAX];
	char message[1024];
	int ruleset; /* of Landlock, for the session; the receiver's to close; -1 where none came */
};

long now_ms(void);

/* A connection to root's agent, or -1. */
int wire_connect(const char *path, long deadline);

bool wire_send_caller(int fd, enum op op, const struct caller *caller, long deadline);

/* A packet without content; passed >= 0 is a descriptor to hand over. */
bool wire_send(int fd, enum op op, int passed, long deadline);

/* ECONNRESET: the agent has hung up. */
bool wire_receive(int fd, struct reply *reply, long deadline);

/* Closes the descriptor of a reply, if it has one. */
void wire_discard(struct reply *reply);

#endif
