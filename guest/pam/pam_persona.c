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
#include <linux/seccomp.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#define PAM_SM_ACCOUNT
#define PAM_SM_SESSION
#define PAM_SM_AUTH
#include <security/pam_ext.h>
#include <security/pam_modules.h>

#include "accounts.h"
#include "settings.h"
#include "starting.h"
#include "user.h"
#include "wire.h"

#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif

#define EXPORT __attribute__((visibility("default")))
#define RESTART_MS 5000 /* an agent that is being restarted is heard of by then, and again each time */
#define START_MS 60000 /* one start of the agent, as long as it makes progress */
#define COMPLAIN_MS 1000 /* nobody is stopped, so nobody is kept waiting for long */
#define AGAIN_MS 100

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
 * Who is to be gated cannot be, for the reason in errno.  What happens then was settled beforehand, by the mode:
 * ``what`` names for the log what failed, ``message`` is what a user is told who is refused for it.
 */
static int not_gated(pam_handle_t *pamh, const struct options *options, const struct user *user, const char *what,
		     const char *message)
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
		message = "persona: this machine's gate state cannot be understood and its agent does not answer; "
			  "its operator must restart persona-agent";
	return refuse(pamh, message, PAM_AUTHINFO_UNAVAIL);
}

/* The same where there is no agent, or none that makes sense. */
static int without_agent(pam_handle_t *pamh, const struct options *options, const struct user *user)
{
	return not_gated(pamh, options, user, options->socket,
			 "persona: the agent of this machine does not answer, so nobody can be admitted; its operator "
			 "must start persona-agent");
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
		return not_gated(pamh, options, user, "seccomp",
				 "persona: this session cannot be gated, so it is refused; this machine's log says why");
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
		return without_agent(pamh, options, user);
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
		result = without_agent(pamh, options, user);
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
		result = not_gated(pamh, &options, &user, "the user's groups",
				   "persona: your groups cannot be looked up, so what you may run is not known; an "
				   "operator finds the reason in this machine's log");
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
