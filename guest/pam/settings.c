/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* What the module goes by before it asks anybody: its options, and what the agent left behind. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <syslog.h>
#include <unistd.h>

#include <security/pam_ext.h>
#include <security/pam_modutil.h>

#include "settings.h"

#define STATE_MAX 512
#define UID_MIN_DEFAULT 1000

struct options parse_options(pam_handle_t *pamh, int argc, const char **argv)
{
	struct options options = {
		.socket = "/run/persona/pam.sock",
		.state = "/var/lib/persona/gate.state",
		.login_defs = "/etc/login.defs",
		.starting = "/run/persona/state/starting",
		.timeout_ms = 6000,
	};

	for (int i = 0; i < argc; i++) {
		if (strncmp(argv[i], "socket=", 7) == 0) {
			options.socket = argv[i] + 7;
		} else if (strncmp(argv[i], "state=", 6) == 0) {
			options.state = argv[i] + 6;
		} else if (strncmp(argv[i], "login_defs=", 11) == 0) {
			options.login_defs = argv[i] + 11;
		} else if (strncmp(argv[i], "starting=", 9) == 0) {
			options.starting = argv[i] + 9;
		} else if (strncmp(argv[i], "timeout=", 8) == 0) {
			char *end;
			long value = strtol(argv[i] + 8, &end, 10);
			if (*end == '\0' && value >= 100 && value <= 60000)
				options.timeout_ms = value;
			else
				pam_syslog(pamh, LOG_ERR, "option %s: expected 100 to 60000; using %ld", argv[i],
					   options.timeout_ms);
		} else if (strcmp(argv[i], "debug") == 0) {
			options.debug = true;
		} else {
			/* A typo must not lock people out: say it, and go on with the defaults. */
			pam_syslog(pamh, LOG_ERR, "unknown option %s", argv[i]);
		}
	}
	return options;
}

static bool parse_uid(const char *text, int base, unsigned long *uid)
{
	char *end;

	errno = 0;
	*uid = strtoul(text, &end, base);
	return errno == 0 && *text >= '0' && *text <= '9' && *end == '\0' && *uid <= INT_MAX;
}

/* What the agent would write: UID_MIN of login.defs(5), in the notations that it may have there. */
static unsigned long default_uid_min(pam_handle_t *pamh, const struct options *options)
{
	char *text = pam_modutil_search_key(pamh, options->login_defs, "UID_MIN");
	unsigned long found = UID_MIN_DEFAULT, value;

	if (text != NULL && parse_uid(text, 0, &value))
		found = value;
	free(text);
	return found;
}

static bool parse_state_line(struct state *state, char *line)
{
	char *value = strchr(line, '=');

	if (value == NULL)
		return false;
	*value++ = '\0';
	if (strcmp(line, "mode") == 0) {
		state->enforce = strcmp(value, "enforce") == 0;
		return state->enforce || strcmp(value, "complain") == 0;
	}
	if (strcmp(line, "uid_min") == 0)
		return parse_uid(value, 10, &state->uid_min);
	if (strcmp(line, "break_glass") == 0) {
		size_t length = strlen(value);
		if (length > STRING_MAX)
			return false;
		memcpy(state->break_glass, value, length + 1);
		return true;
	}
	return false;
}

/*
 * A missing file is a fresh install: complain.  One that is there and cannot be understood refuses
 * those that would be gated, and nobody else.
 */
struct state read_state(pam_handle_t *pamh, const struct options *options)
{
	struct state state = { false, false, ULONG_MAX, "" };
	char text[STATE_MAX + 1];
	char *line, *rest = NULL;
	ssize_t size;
	int fd = open(options->state, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);

	if (fd < 0) {
		if (errno != ENOENT) {
			pam_syslog(pamh, LOG_ERR, "%s: %m", options->state);
			state.enforce = state.malformed = true;
		}
		state.uid_min = default_uid_min(pamh, options);
		return state;
	}
	size = read(fd, text, STATE_MAX);
	close(fd);
	if (size <= 0 || size == STATE_MAX || memchr(text, '\0', (size_t)size) != NULL) {
		state.malformed = true;
	} else {
		text[size] = '\0';
		for (line = strtok_r(text, "\n", &rest); line != NULL; line = strtok_r(NULL, "\n", &rest))
			if (!parse_state_line(&state, line))
				state.malformed = true;
	}
	if (state.malformed) {
		pam_syslog(pamh, LOG_ERR, "%s cannot be understood; restart persona-agent to write it anew",
			   options->state);
		state.enforce = true;
		state.uid_min = ULONG_MAX;
		state.break_glass[0] = '\0';
	}
	if (state.uid_min == ULONG_MAX)
		state.uid_min = default_uid_min(pamh, options);
	return state;
}
