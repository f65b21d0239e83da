/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/*
 * The options of the module, and the state of the gate that the agent keeps in a file for the time when it is not
 * there (docs/protocol.md).
 */
#ifndef PERSONA_SETTINGS_H
#define PERSONA_SETTINGS_H

#include <security/pam_modules.h>
#include <stdbool.h>

#include "wire.h"

struct options {
	const char *socket;
	const char *state;
	const char *login_defs;
	const char *starting;
	long timeout_ms;
	bool debug;
};

struct state {
	bool enforce;
	bool malformed; /* and therefore enforce */
	unsigned long uid_min;
	char break_glass[STRING_MAX + 1];
};

/* A word that is no option is logged, and nothing else comes of it. */
struct options parse_options(pam_handle_t *pamh, int argc, const char **argv);

struct state read_state(pam_handle_t *pamh, const struct options *options);

#endif
