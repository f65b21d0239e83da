/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/*
 * The packets between the PAM module and the agent (docs/protocol.md).  Every wait has a deadline, in
 * milliseconds of CLOCK_MONOTONIC; what fails says why in errno.
 */
#ifndef PERSONA_WIRE_H
#define PERSONA_WIRE_H

#include <linux/filter.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define STRING_MAX 255
#define GROUPS_PER_PACKET 128 /* in one packet; there may be any number of packets */
#define FILTER_MAX 64

enum op { OP_ACCOUNT = 1, OP_OPEN = 2, OP_LISTENER = 3, OP_PRESENT = 4, OP_GROUPS = 5 };
enum verdict { VERDICT_PASS = 0, VERDICT_GATE = 1, VERDICT_DENY = 2, VERDICT_DONE = 3 };

/* Any number of names, one after the other, each with its NUL; ``text`` is the owner's to free. */
struct names {
	char *text;
	size_t size, room, count;
};

/* Who wants a session, and how. */
struct caller {
	uint32_t uid;
	const char *service, *user, *remote, *shell;
	const struct names *groups;
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

/* One name more; what is over STRING_MAX bytes is left out.  False: no memory. */
bool wire_add_name(struct names *names, const char *name);

/* In several packets where one is too small. */
bool wire_send_caller(int fd, enum op op, const struct caller *caller, long deadline);

/* A packet without content; passed >= 0 is a descriptor to hand over. */
bool wire_send(int fd, enum op op, int passed, long deadline);

/* ECONNRESET: the agent has hung up. */
bool wire_receive(int fd, struct reply *reply, long deadline);

/* Closes the descriptor of a reply, if it has one. */
void wire_discard(struct reply *reply);

#endif
