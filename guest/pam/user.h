/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* Who logs in, with all their groups. */
#ifndef PERSONA_USER_H
#define PERSONA_USER_H

#include <pwd.h>
#include <security/pam_modules.h>
#include <stdbool.h>
#include <sys/types.h>

#include "wire.h"

struct user {
	const char *name;
	const struct passwd *record;
	gid_t *gids;
	size_t gid_count;
	struct names groups; /* of those that have one */
};

/* A result of PAM's; ``forget_user`` after PAM_SUCCESS. */
int load_user(pam_handle_t *pamh, struct user *user);

void forget_user(struct user *user);

/* By number: however many groups the user has, and whatever their names are, one name is looked up. */
bool is_in_group(struct user *user, const char *name);

/* The names of all groups; false, with errno, where they cannot be had by ``deadline``. */
bool load_groups(struct user *user, long deadline);

#endif
