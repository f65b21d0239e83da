/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* Who is gated: by the audit login uid, and who of those is exempt. */
#ifndef PERSONA_GATED_H
#define PERSONA_GATED_H

#include "maps.h"

#define NGROUPS_MAX 65536 /* NGROUPS_MAX of the kernel: no task is in more */
#define HALVINGS 17 /* after so many none of them is left */

/* A group that is looked for in a task's list, from low to before high. */
struct search {
	__u64 list; /* a number: the verifier lets nothing be added to a pointer that it knows too well */
	__u32 wanted;
	__u32 low;
	__u32 high;
	__u32 found;
};

static long halve(__u32 number, struct search *search)
{
	__u32 middle;
	kgid_t gid;

	if (search->low >= search->high)
		return 1;
	middle = search->low + (search->high - search->low) / 2;
	if (bpf_probe_read_kernel(&gid, sizeof(gid), (const void *)(search->list + (__u64)middle * sizeof(gid))))
		return 1;
	search->found = gid.val == search->wanted;
	if (gid.val < search->wanted)
		search->low = middle + 1;
	else
		search->high = middle;
	return search->found;
}

/*
 * However many groups there are: the kernel keeps them in order (groups_sort() comes before each
 * set_current_groups()) and looks for one just like this, in groups_search().  A callback, since a loop
 * here would be walked by the verifier along each of its 2^17 ways.
 */
static int in_group(const struct cred *cred, __u32 wanted)
{
	struct search search = { .wanted = wanted };

	if (cred->gid.val == wanted)
		return 1;
	search.high = (__u32)cred->group_info->ngroups;
	if (search.high > NGROUPS_MAX)
		search.high = NGROUPS_MAX;
	if (bpf_probe_read_kernel(&search.list, sizeof(search.list), &cred->group_info))
		return 0;
	search.list += bpf_core_field_offset(struct group_info, gid);
	bpf_loop(HALVINGS, halve, &search, 0);
	return search.found != 0;
}

/* Break glass: looked at only before something would be stopped, so it costs nobody else anything. */
static int breaks_glass(struct task_struct *task, const struct settings *set)
{
	__u32 session = task->sessionid, yes = 1;

	if (bpf_map_lookup_elem(&free_sessions, &session))
		return 1;
	if (set->break_glass == NO_ID || !in_group(task->cred, set->break_glass))
		return 0;
	if (session != NO_ID)
		bpf_map_update_elem(&free_sessions, &session, &yes, BPF_ANY);
	return 1;
}

/*
 * sshd, cron or login between pam_loginuid and the gate, and the helpers of other PAM modules: all root,
 * and without the gate's filter, which nobody who ever was in a gated session can be.
 */
static int prepares_session(struct task_struct *task)
{
	const struct cred *cred = task->cred;

	return task->seccomp.mode == 0 && cred->uid.val == 0 && cred->euid.val == 0 && cred->suid.val == 0 &&
	       cred->fsuid.val == 0;
}

static int login_is_gated(const struct task_struct *task)
{
	__u32 zero = 0, login = task->loginuid.val;
	const struct settings *set = bpf_map_lookup_elem(&settings, &zero);

	return login != NO_ID && (!set || !is_root_or_system(login, set->uid_min));
}

#endif
