/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* The user: looked up by PAM's own means, groups by number first, names only where they matter. */
#define _GNU_SOURCE
#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <security/pam_modutil.h>

#include "user.h"

#define ENTRY_MAX (64u << 20) /* of one group: a directory's may list every employee */
#define GROUPS_FIRST 256
#define ONE_BY_ONE 64 /* groups whose names are looked up one by one; for more, /etc/group is read once */

int load_user(pam_handle_t *pamh, struct user *user)
{
	const void *name = NULL;

	memset(user, 0, sizeof(*user));
	if (pam_get_item(pamh, PAM_USER, &name) != PAM_SUCCESS || name == NULL)
		return PAM_USER_UNKNOWN;
	user->name = name;
	user->record = pam_modutil_getpwnam(pamh, user->name);
	return user->record != NULL ? PAM_SUCCESS : PAM_USER_UNKNOWN;
}

void forget_user(struct user *user)
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
bool is_in_group(struct user *user, const char *name)
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
bool load_groups(struct user *user, long deadline)
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
