/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/*
 * pam_persona: asks the agent whether a user may log in, and puts the exec gate on his session.
 *
 * It runs inside sshd, su, cron and the user manager: no interpreter, no JSON, no network, no global
 * state, and no wait without a deadline.  It decides nothing by itself, except for root, system users
 * and the break-glass group while the agent is not there: they are never locked out.
 *
 * Options: socket=PATH state=PATH timeout=MILLISECONDS debug.  docs/protocol.md has the packets.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/seccomp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#define PAM_SM_ACCOUNT
#define PAM_SM_SESSION
#define PAM_SM_AUTH
#include <security/pam_ext.h>
#include <security/pam_modules.h>
#include <security/pam_modutil.h>

#include "wire.h"

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif

#define EXPORT __attribute__((visibility("default")))
#define STATE_MAX 512
#define UID_MIN_DEFAULT 1000
#define RESTART_MS 3000 /* an agent that is being restarted is back by then */
#define COMPLAIN_MS 1000 /* nobody is stopped, so nobody is kept waiting for long */
#define AGAIN_MS 100

struct options {
	const char *socket;
	const char *state;
	long timeout_ms;
	bool debug;
};

/* What the agent left behind for the time when it is not there. */
struct state {
	bool enforce;
	bool malformed;
	unsigned long uid_min;
	char break_glass[STRING_MAX + 1];
};

struct user {
	const char *name;
	const struct passwd *record;
	unsigned int group_count;
	char groups[GROUPS_MAX][STRING_MAX + 1];
};

/* ---- options and state --------------------------------------------------------------------- */

static struct options parse_options(pam_handle_t *pamh, int argc, const char **argv)
{
	struct options options = { "/run/persona/pam.sock", "/var/lib/persona/gate.state", 6000, false };

	for (int i = 0; i < argc; i++) {
		if (strncmp(argv[i], "socket=", 7) == 0) {
			options.socket = argv[i] + 7;
		} else if (strncmp(argv[i], "state=", 6) == 0) {
			options.state = argv[i] + 6;
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

static bool parse_state_line(struct state *state, char *line)
{
	char *value = strchr(line, '=');
	char *end;

	if (value == NULL)
		return false;
	*value++ = '\0';
	if (strcmp(line, "mode") == 0) {
		state->enforce = strcmp(value, "enforce") == 0;
		return state->enforce || strcmp(value, "complain") == 0;
	}
	if (strcmp(line, "uid_min") == 0) {
		errno = 0;
		state->uid_min = strtoul(value, &end, 10);
		return errno == 0 && *value >= '0' && *value <= '9' && *end == '\0' && state->uid_min <= INT_MAX;
	}
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
static struct state read_state(pam_handle_t *pamh, const struct options *options)
{
	struct state state = { false, false, UID_MIN_DEFAULT, "" };
	char text[STATE_MAX + 1];
	char *line, *rest = NULL;
	ssize_t size;
	int fd = open(options->state, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);

	if (fd < 0) {
		if (errno != ENOENT) {
			pam_syslog(pamh, LOG_ERR, "%s: %m", options->state);
			state.enforce = state.malformed = true;
		}
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
		state.uid_min = UID_MIN_DEFAULT;
	}
	return state;
}

/* ---- the user ------------------------------------------------------------------------------ */

static bool copy_string(char *to, const char *from)
{
	size_t length = strlen(from);

	if (length > STRING_MAX)
		return false;
	memcpy(to, from, length + 1);
	return true;
}

static int load_user(pam_handle_t *pamh, struct user *user)
{
	gid_t ids[GROUPS_MAX];
	int count = GROUPS_MAX;
	const void *name = NULL;

	memset(user, 0, sizeof(*user));
	if (pam_get_item(pamh, PAM_USER, &name) != PAM_SUCCESS || name == NULL)
		return PAM_USER_UNKNOWN;
	user->name = name;
	user->record = pam_modutil_getpwnam(pamh, user->name);
	if (user->record == NULL)
		return PAM_USER_UNKNOWN;
	if (getgrouplist(user->name, user->record->pw_gid, ids, &count) < 0) {
		pam_syslog(pamh, LOG_ERR, "%s is in more than %d groups", user->name, GROUPS_MAX);
		return PAM_SYSTEM_ERR;
	}
	for (int i = 0; i < count; i++) {
		const struct group *group = pam_modutil_getgrgid(pamh, ids[i]);
		if (group != NULL && copy_string(user->groups[user->group_count], group->gr_name))
			user->group_count++;
	}
	return PAM_SUCCESS;
}

static bool in_group(const struct user *user, const char *name)
{
	if (name[0] == '\0')
		return false;
	for (unsigned int i = 0; i < user->group_count; i++)
		if (strcmp(user->groups[i], name) == 0)
			return true;
	return false;
}

static const char *item_of(pam_handle_t *pamh, int type)
{
	const void *item = NULL;

	return pam_get_item(pamh, type, &item) == PAM_SUCCESS && item != NULL ? item : "";
}

static bool send_caller(pam_handle_t *pamh, int fd, enum op op, const struct user *user, long deadline)
{
	const struct caller caller = {
		.uid = user->record->pw_uid,
		.service = item_of(pamh, PAM_SERVICE),
		.user = user->name,
		.remote = item_of(pamh, PAM_RHOST),
		.shell = user->record->pw_shell,
		.group_count = user->group_count,
		.groups = user->groups,
	};

	return wire_send_caller(fd, op, &caller, deadline);
}

/* ---- the decision -------------------------------------------------------------------------- */

static int refuse(pam_handle_t *pamh, const char *message, int code)
{
	pam_error(pamh, "%s", message);
	return code;
}

/* Root and system users: without an agent they go on whatever the mode. */
static bool is_never_gated(const struct state *state, const struct user *user)
{
	return user->record->pw_uid == 0 || user->record->pw_uid < state->uid_min;
}

/* The agent is not there, or makes no sense: what happens then was settled beforehand. */
static int without_agent(pam_handle_t *pamh, const struct options *options, const struct user *user,
			 const char *what)
{
	int error = errno;
	struct state state = read_state(pamh, options);

	if (is_never_gated(&state, user))
		return PAM_SUCCESS;
	if (in_group(user, state.break_glass)) {
		pam_syslog(pamh, LOG_ALERT, "BREAK GLASS: %s logs in ungated, without an agent", user->name);
		return PAM_SUCCESS;
	}
	errno = error;
	if (!state.enforce) {
		pam_syslog(pamh, LOG_WARNING, "%s: %m; complain mode, %s goes on ungated", what, user->name);
		return PAM_SUCCESS;
	}
	pam_syslog(pamh, LOG_ERR, "%s: %m; %s is refused", what, user->name);
	if (state.malformed)
		return refuse(pamh,
			      "persona: this machine's gate state cannot be understood and its agent does not "
			      "answer; its operator must restart persona-agent",
			      PAM_AUTHINFO_UNAVAIL);
	return refuse(pamh,
		      "persona: the agent of this machine does not answer, so nobody can be admitted; its operator "
		      "must start persona-agent",
		      PAM_AUTHINFO_UNAVAIL);
}

static int install_filter(const struct reply *reply)
{
	struct sock_fprog program = {
		reply->filter_count,
		(struct sock_filter *)(uintptr_t)reply->filter,
	};

	return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
			    SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, &program);
}

/* Landlock's rules where the kernel layer is missing; the kernel keeps a copy of them. */
static bool bind_to(struct reply *reply)
{
	bool bound = reply->ruleset < 0 || syscall(SYS_landlock_restrict_self, reply->ruleset, 0) == 0;

	wire_discard(reply);
	return bound;
}

/* From here on a failure leaves a filter without a listener, or none at all: refuse, never go on. */
static int put_up_gate(pam_handle_t *pamh, const struct options *options, const struct user *user, int fd,
		       struct reply *reply, long deadline)
{
	bool sent;
	int listener = install_filter(reply);

	if (listener < 0 && errno != EBUSY)
		return without_agent(pamh, options, user, "seccomp");
	if (listener >= 0 && !bind_to(reply)) {
		pam_syslog(pamh, LOG_ERR, "landlock: %m; %s is refused", user->name);
		close(listener);
		return refuse(pamh, "persona: the gate could not be put up: landlock", PAM_SESSION_ERR);
	}
	/* EBUSY: a listener is there already.  Ours (a session inside a session), or somebody else's? */
	wire_discard(reply);
	sent = wire_send(fd, listener < 0 ? OP_PRESENT : OP_LISTENER, listener, deadline);
	/* sshd forks without exec: a copy left open would let the session answer itself. */
	if (listener >= 0)
		close(listener);
	if (sent && wire_receive(fd, reply, deadline) && reply->verdict == VERDICT_DONE)
		return PAM_SUCCESS;
	pam_syslog(pamh, LOG_ERR, "the gate of %s could not be handed over", user->name);
	return refuse(pamh, reply->verdict == VERDICT_DENY ? reply->message : "persona: the gate could not be put up",
		      PAM_SESSION_ERR);
}

/* How long a user's login waits for an agent that has just been found away. */
static long patience_ms(pam_handle_t *pamh, const struct options *options, const struct user *user)
{
	struct state state = read_state(pamh, options);

	if (is_never_gated(&state, user) || in_group(user, state.break_glass))
		return 0;
	return state.enforce ? RESTART_MS : COMPLAIN_MS;
}

/*
 * The agent's first answer, and the connection that it came by; or -1.  An agent that is not there may be
 * in the middle of a restart, and one that hangs up before it has answered at the beginning of it.
 */
static int ask(pam_handle_t *pamh, const struct options *options, const struct user *user, enum op op,
	       struct reply *reply, long deadline)
{
	const struct timespec pause = { 0, AGAIN_MS * 1000 * 1000 };
	bool hung_up = false;
	long until = 0;
	int error;

	for (;;) {
		int fd = wire_connect(options->socket, deadline);

		if (fd >= 0 && send_caller(pamh, fd, op, user, deadline) && wire_receive(fd, reply, deadline))
			return fd;
		error = errno;
		if (fd >= 0) {
			close(fd);
			if (hung_up || (error != ECONNRESET && error != EPIPE))
				break;
			hung_up = true; /* twice is no restart any more: it may be what we say that ends it */
		} else if (error != ENOENT && error != ECONNREFUSED) {
			break;
		}
		if (until == 0) {
			until = now_ms() + patience_ms(pamh, options, user);
			if (until > deadline)
				until = deadline;
		}
		if (now_ms() + AGAIN_MS > until)
			break;
		nanosleep(&pause, NULL);
	}
	errno = error;
	return -1;
}

static int decide(pam_handle_t *pamh, enum op op, int argc, const char **argv)
{
	struct options options = parse_options(pamh, argc, argv);
	long deadline = now_ms() + options.timeout_ms;
	struct user user;
	struct reply reply = { .ruleset = -1 };
	int result = load_user(pamh, &user);
	int fd;

	if (result != PAM_SUCCESS)
		return result;
	fd = ask(pamh, &options, &user, op, &reply, deadline);
	if (fd < 0)
		return without_agent(pamh, &options, &user, options.socket);
	if (options.debug)
		pam_syslog(pamh, LOG_DEBUG, "%s: verdict %d", user.name, (int)reply.verdict);
	switch (reply.verdict) {
	case VERDICT_PASS:
		break;
	case VERDICT_GATE:
		if (op == OP_OPEN && reply.filter_count > 0)
			result = put_up_gate(pamh, &options, &user, fd, &reply, deadline);
		else
			result = PAM_SYSTEM_ERR;
		break;
	case VERDICT_DENY:
		result = refuse(pamh, reply.message[0] != '\0' ? reply.message : "persona: this login is refused",
				op == OP_ACCOUNT ? PAM_PERM_DENIED : PAM_SESSION_ERR);
		break;
	case VERDICT_DONE:
		result = PAM_SYSTEM_ERR; /* an answer to what was not asked */
		break;
	}
	wire_discard(&reply);
	close(fd);
	return result;
}

EXPORT int pam_sm_acct_mgmt(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	(void)flags;
	return decide(pamh, OP_ACCOUNT, argc, argv);
}

EXPORT int pam_sm_open_session(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	(void)flags;
	return decide(pamh, OP_OPEN, argc, argv);
}

/* The gate stays until the last process of the session is gone: there is nothing to close. */
EXPORT int pam_sm_close_session(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	(void)pamh;
	(void)flags;
	(void)argc;
	(void)argv;
	return PAM_SUCCESS;
}

EXPORT int pam_sm_authenticate(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	(void)pamh;
	(void)flags;
	(void)argc;
	(void)argv;
	return PAM_IGNORE;
}

EXPORT int pam_sm_setcred(pam_handle_t *pamh, int flags, int argc, const char **argv)
{
	(void)pamh;
	(void)flags;
	(void)argc;
	(void)argv;
	return PAM_IGNORE;
}
