/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/*
 * pam_persona: asks the agent whether a user may log in, and puts the exec gate on their session.
 *
 * It runs inside sshd, su, cron and the user manager: no interpreter, no JSON, no network, no global
 * state, and no wait without a deadline.
 *
 * The order in decide() is what keeps people from being locked out.  Root and system accounts pass by
 * their number alone; then members of the break-glass group, whatever the agent says; only then comes what
 * can fail, be too large or take time (the user's groups, the agent), and where it does, complain mode lets
 * everybody in and enforce mode refuses.
 *
 * Options: socket=PATH state=PATH starting=PATH login_defs=PATH timeout=MILLISECONDS debug.  docs/protocol.md has
 * the packets.
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

#include "accounts.h"
#include "wire.h"

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif

#define EXPORT __attribute__((visibility("default")))
#define STATE_MAX 512
#define ENTRY_MAX (64u << 20) /* of one group: a directory's may list every employee */
#define GROUPS_FIRST 256
#define ONE_BY_ONE 64 /* groups whose names are looked up one by one; for more, /etc/group is read once */
#define UID_MIN_DEFAULT 1000
#define RESTART_MS 5000 /* an agent that is being restarted is heard of by then, and again each time */
#define START_MS 60000 /* one start of the agent, as long as it makes progress */
#define PROGRESS_MAX 32
#define COMPLAIN_MS 1000 /* nobody is stopped, so nobody is kept waiting for long */
#define AGAIN_MS 100

struct options {
	const char *socket;
	const char *state;
	const char *login_defs;
	const char *starting;
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
	gid_t *gids;
	size_t gid_count;
	struct names groups; /* of those that have one */
};

/* ---- options and state --------------------------------------------------------------------- */

static struct options parse_options(pam_handle_t *pamh, int argc, const char **argv)
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
static struct state read_state(pam_handle_t *pamh, const struct options *options)
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

/* ---- the user ------------------------------------------------------------------------------ */

static int load_user(pam_handle_t *pamh, struct user *user)
{
	const void *name = NULL;

	memset(user, 0, sizeof(*user));
	if (pam_get_item(pamh, PAM_USER, &name) != PAM_SUCCESS || name == NULL)
		return PAM_USER_UNKNOWN;
	user->name = name;
	user->record = pam_modutil_getpwnam(pamh, user->name);
	return user->record != NULL ? PAM_SUCCESS : PAM_USER_UNKNOWN;
}

static void forget_user(struct user *user)
{
	free(user->gids);
	free(user->groups.text);
	user->gids = NULL;
	user->groups.text = NULL;
}

/* The numbers of all groups of a user, once; false where they cannot be had. */
static bool load_gids(struct user *user)
{
	int count = GROUPS_FIRST, room;

	if (user->gids != NULL)
		return true;
	for (;;) {
		gid_t *gids = realloc(user->gids, (size_t)count * sizeof(gid_t));

		if (gids == NULL)
			break;
		user->gids = gids;
		room = count;
		if (getgrouplist(user->name, user->record->pw_gid, gids, &count) >= 0) {
			user->gid_count = (size_t)count;
			return true;
		}
		if (count <= room) { /* no more room is wanted: the user database failed */
			errno = EIO;
			break;
		}
	}
	free(user->gids);
	user->gids = NULL;
	return false;
}

/* A group's entry by its name or else by its number, in a buffer that the caller frees; NULL where there is none. */
static const struct group *find_group(const char *name, gid_t gid, struct group *entry, char **buffer, size_t *size)
{
	for (;;) {
		struct group *found = NULL;
		int error = ERANGE;
		char *larger;

		if (*buffer != NULL)
			error = name != NULL ? getgrnam_r(name, entry, *buffer, *size, &found) :
					       getgrgid_r(gid, entry, *buffer, *size, &found);
		if (error != ERANGE)
			return found;
		if (*size >= ENTRY_MAX)
			return NULL;
		larger = realloc(*buffer, *size == 0 ? 4096 : *size * 4);
		if (larger == NULL)
			return NULL;
		*buffer = larger;
		*size = *size == 0 ? 4096 : *size * 4;
	}
}

static bool has_gid(const struct user *user, gid_t gid)
{
	for (size_t i = 0; i < user->gid_count; i++)
		if (user->gids[i] == gid)
			return true;
	return false;
}

/* By number: however many groups the user has, and whatever their names are, one name is looked up. */
static bool is_in_group(struct user *user, const char *name)
{
	struct group entry;
	char *buffer = NULL;
	size_t size = 0;
	bool found = false;

	if (name[0] == '\0')
		return false;
	if (find_group(name, 0, &entry, &buffer, &size) != NULL)
		found = entry.gr_gid == user->record->pw_gid || (load_gids(user) && has_gid(user, entry.gr_gid));
	free(buffer);
	return found;
}

static int compare_gids(const void *one, const void *other)
{
	const gid_t *a = one, *b = other;

	return (*a > *b) - (*a < *b);
}

/*
 * Names that /etc/group has, by reading it once: a look-up by number reads it from the start, and a
 * thousand of them take longer than a login may.  Those that are found are taken from the list.
 */
static bool names_from_file(struct user *user)
{
	struct group entry, *found;
	char *buffer = NULL;
	size_t size = 4096, left = 0;
	FILE *file = fopen("/etc/group", "re");
	bool *named = calloc(user->gid_count, sizeof(bool));
	bool done = named != NULL;
	int error = 0;
	long at = 0;

	if (file == NULL || named == NULL || (buffer = malloc(size)) == NULL)
		goto out; /* then one by one, slowly */
	qsort(user->gids, user->gid_count, sizeof(gid_t), compare_gids);
	while (done) {
		const gid_t *gid;

		error = fgetgrent_r(file, &entry, buffer, size, &found);
		if (error == ERANGE && size < ENTRY_MAX) {
			char *larger = realloc(buffer, size * 4);
			if (larger == NULL || fseek(file, at, SEEK_SET) != 0)
				break;
			buffer = larger;
			size *= 4;
			continue;
		}
		if (error != 0)
			break;
		at = ftell(file);
		gid = bsearch(&entry.gr_gid, user->gids, user->gid_count, sizeof(gid_t), compare_gids);
		if (gid == NULL || named[gid - user->gids])
			continue;
		named[gid - user->gids] = true;
		done = wire_add_name(&user->groups, entry.gr_name);
	}
	for (size_t i = 0; i < user->gid_count; i++)
		if (!named[i])
			user->gids[left++] = user->gids[i];
	user->gid_count = left;
out:
	if (file != NULL)
		fclose(file);
	free(buffer);
	free(named);
	return done;
}

/*
 * The names of all groups, however many; false where they cannot be had in time.  It reorders and shortens
 * user->gids, so call it last.  A name that is too long for a packet is left out: no policy can name such a group.
 */
static bool load_groups(struct user *user, long deadline)
{
	struct group entry;
	char *buffer = NULL;
	size_t size = 0;
	bool done = load_gids(user);

	if (done && user->gid_count > ONE_BY_ONE)
		done = names_from_file(user);
	for (size_t i = 0; done && i < user->gid_count; i++) {
		if (now_ms() >= deadline) {
			errno = ETIMEDOUT;
			done = false;
		} else if (find_group(NULL, user->gids[i], &entry, &buffer, &size) != NULL) {
			done = wire_add_name(&user->groups, entry.gr_name);
		}
	}
	free(buffer);
	return done;
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
		.groups = &user->groups,
	};

	return wire_send_caller(fd, op, &caller, deadline);
}

/* ---- the decision -------------------------------------------------------------------------- */

static int refuse(pam_handle_t *pamh, const char *message, int code)
{
	pam_error(pamh, "%s", message);
	return code;
}

/*
 * Who is to be gated cannot be: the agent is not there or makes no sense, the user's groups cannot be had.
 * What happens then was settled beforehand, by the mode.
 */
static int without_agent(pam_handle_t *pamh, const struct options *options, const struct user *user,
			 const char *what)
{
	int error = errno;
	struct state state = read_state(pamh, options); /* anew: the agent may have written another mode meanwhile */

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

/* Once the filter is there, a failure leaves it without a listener, and nothing could start: refuse, never go on. */
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
	if (listener < 0 && !read_state(pamh, options).enforce) {
		pam_syslog(pamh, LOG_WARNING, "another gate is there; complain mode, %s goes on", user->name);
		return PAM_SUCCESS;
	}
	pam_syslog(pamh, LOG_ERR, "the gate of %s could not be handed over", user->name);
	return refuse(pamh, reply->verdict == VERDICT_DENY ? reply->message : "persona: the gate could not be put up",
		      PAM_SESSION_ERR);
}

/* How long a user's login waits for an agent that has just been found away. */
static long patience_ms(pam_handle_t *pamh, const struct options *options)
{
	return read_state(pamh, options).enforce ? RESTART_MS : COMPLAIN_MS;
}

/* What is told of a start of the agent: its process, and a number that changes while it makes progress. */
struct progress {
	bool known;
	char text[PROGRESS_MAX + 1];
	char starter[PROGRESS_MAX + 1];
};

/* Whether one start, the first that is seen, goes on: what ended and began again is no progress. */
static bool is_starting(const struct options *options, struct progress *seen)
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

/*
 * The agent's first answer, and the connection that it came by; or -1.  An agent that is not there may be
 * in the middle of a restart, and one that hangs up before it has answered at the beginning of it.
 * *deadline moves while it starts: the conversation has its time from then on.
 */
static int ask(pam_handle_t *pamh, const struct options *options, const struct user *user, enum op op,
	       struct reply *reply, long *deadline)
{
	const struct timespec pause = { 0, AGAIN_MS * 1000 * 1000 };
	struct progress seen = { 0 };
	bool hung_up = false;
	long patience = 0, until = 0, latest = now_ms() + START_MS;
	int error;

	for (;;) {
		int fd = wire_connect(options->socket, *deadline);

		if (fd >= 0 && send_caller(pamh, fd, op, user, *deadline) && wire_receive(fd, reply, *deadline))
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
			patience = patience_ms(pamh, options);
			until = now_ms() + patience;
			if (until > *deadline)
				until = *deadline;
		}
		if (patience == RESTART_MS && is_starting(options, &seen) && now_ms() < latest) {
			until = now_ms() + patience;
			*deadline = now_ms() + options->timeout_ms;
		}
		if (now_ms() + AGAIN_MS > until)
			break;
		nanosleep(&pause, NULL);
	}
	errno = error;
	return -1;
}

/* Goes in whatever comes of telling the agent, which records it. */
static int break_glass(pam_handle_t *pamh, const struct options *options, const struct state *state,
		       const struct user *user, enum op op, long deadline)
{
	struct names only = { 0 };
	struct user as_member = { .name = user->name, .record = user->record };
	struct reply reply = { .ruleset = -1 };
	int fd = -1;
	bool told;

	if (wire_add_name(&only, state->break_glass)) {
		as_member.groups = only;
		fd = wire_connect(options->socket, deadline);
	}
	told = fd >= 0 && send_caller(pamh, fd, op, &as_member, deadline) && wire_receive(fd, &reply, deadline) &&
	       reply.verdict == VERDICT_PASS;
	if (!told)
		pam_syslog(pamh, LOG_ALERT, "BREAK GLASS: %s logs in ungated, without an agent", user->name);
	wire_discard(&reply);
	if (fd >= 0)
		close(fd);
	free(only.text);
	return PAM_SUCCESS;
}

/* The answer for somebody who may be gated. */
static int ask_agent(pam_handle_t *pamh, const struct options *options, const struct user *user, enum op op,
		     long deadline)
{
	struct reply reply = { .ruleset = -1 };
	int result, fd = ask(pamh, options, user, op, &reply, &deadline);

	if (fd < 0)
		return without_agent(pamh, options, user, options->socket);
	if (options->debug)
		pam_syslog(pamh, LOG_DEBUG, "%s: verdict %d", user->name, (int)reply.verdict);
	if (reply.verdict == VERDICT_PASS) {
		result = PAM_SUCCESS;
	} else if (reply.verdict == VERDICT_GATE && op == OP_OPEN && reply.filter_count > 0) {
		result = put_up_gate(pamh, options, user, fd, &reply, deadline);
	} else if (reply.verdict == VERDICT_DENY) { /* an agent in complain mode says PASS by itself */
		result = refuse(pamh, reply.message[0] != '\0' ? reply.message : "persona: this login is refused",
				op == OP_ACCOUNT ? PAM_PERM_DENIED : PAM_SESSION_ERR);
	} else { /* an answer to what was not asked */
		errno = EPROTO;
		result = without_agent(pamh, options, user, options->socket);
	}
	wire_discard(&reply);
	close(fd);
	return result;
}

static int decide(pam_handle_t *pamh, enum op op, int argc, const char **argv)
{
	struct options options = parse_options(pamh, argc, argv);
	long deadline = now_ms() + options.timeout_ms;
	struct state state = read_state(pamh, &options);
	struct user user;
	int result = load_user(pamh, &user);

	if (result != PAM_SUCCESS)
		return result;
	if (is_root_or_system(user.record->pw_uid, (unsigned int)state.uid_min))
		return PAM_SUCCESS;
	if (is_in_group(&user, state.break_glass))
		result = break_glass(pamh, &options, &state, &user, op, deadline);
	else if (load_groups(&user, deadline))
		result = ask_agent(pamh, &options, &user, op, deadline);
	else
		result = without_agent(pamh, &options, &user, "the user's groups");
	forget_user(&user);
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
