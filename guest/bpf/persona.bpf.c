/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/*
 * The part of the gate that has the last word.  It decides nothing and forgets nothing.
 *
 * The agent answers a seccomp notification, and then the kernel reads path and arguments of that execve
 * again: a second thread may have changed them.  So the agent writes down first what it allowed: this
 * task, this file, these interpreters, this loader, these arguments.  check_file and check_loader let a gated
 * task start nothing else; check_arguments kills it, before its first instruction, if other arguments arrived.
 * Nobody to approve (a dead agent, a listener of the user's own, a road into the machine that no PAM module
 * watches): no start.
 *
 * Gated is who logged in as a user (the audit login uid, which takes a capability to change), and whoever
 * descends from a task that once had an approval.  Not gated: logins of root and of system accounts, members
 * of the break-glass group, and what a service still runs as root before the session is the user's.
 */
#include <linux/bpf.h>
#include <linux/errno.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "accounts.h"
#include "kernel_types.h"
#include "layer.h"
#include "gated.h"

#define SIGKILL 9
#define FMODE_EXEC 0x20 /* include/linux/fs.h: in f_flags of what an execve opens, and of nothing else */
#define BLOCK 128 /* bytes of arguments compared at a time: the stack has 512 */

/* ---- saying no --------------------------------------------------------------------------------- */

/* ``why`` 0: an exec of complain mode that was told of at an earlier step. */
static int refuse_file(const struct file *file, const void *path, struct task_struct *task, struct state *state,
		       __u32 why)
{
	__u32 zero = 0;
	const struct settings *set = bpf_map_lookup_elem(&settings, &zero);

	if (!set)
		return -EACCES;
	if (state)
		state->bprm = 0; /* nothing more to follow */
	else if (prepares_session(task) || breaks_glass(task, set))
		return 0;
	if (why)
		tell(file, path, task, why, set->enforce);
	return set->enforce ? -EACCES : 0;
}

static int refuse(struct linux_binprm *bprm, struct task_struct *task, struct state *state, __u32 why)
{
	return refuse_file(bprm->file, bprm->filename, task, state, why);
}

/* ---- the file ---------------------------------------------------------------------------------- */

static int is(const struct image *image, const struct file *file)
{
	return image->inode == file->f_inode->i_ino && image->device == file->f_inode->i_sb->s_dev;
}

static long compare_word(__u32 number, struct state **with)
{
	__u64 word = number; /* as wide as a pointer, as in let_through */
	struct state *state = *with;

	if (word >= PATH_BYTES / 8)
		return 1;
	state->differs |= state->path[word] ^ state->approval.path[word];
	return 0;
}

/*
 * A script's interpreter opens it by the path that the kernel hands on: it must be the one that was looked at.
 * A callback, which the verifier walks once: a loop it would walk along each of its ways, for many seconds.
 */
static int is_named(struct state *state, const struct linux_binprm *bprm)
{
	__builtin_memset(state->path, 0, PATH_BYTES);
	if (bpf_probe_read_kernel_str(state->path, PATH_BYTES, bprm->interp) < 0)
		return 0;
	state->differs = 0;
	bpf_loop(PATH_BYTES / 8, compare_word, &state, 0);
	return state->differs == 0;
}

/* The next step of an exec under way; a script must have a next one, and the last must be no script. */
static int follows(struct state *state, struct linux_binprm *bprm)
{
	__u32 step = state->next;
	int script = bprm->buf[0] == '#' && bprm->buf[1] == '!';

	if (step >= CHAIN_MAX || step >= state->approval.count)
		return 0;
	if (!is(&state->approval.chain[step], bprm->file) || script != (step + 1 < state->approval.count))
		return 0;
	if (step == state->approval.named && !is_named(state, bprm))
		return 0;
	state->next = step + 1;
	state->file = (__u64)bprm->file;
	return 1;
}

static int is_first(const struct linux_binprm *bprm)
{
	return bprm->interp == bprm->filename; /* each interpreter gets a name of its own */
}

/*
 * Whether this very step was let through already.  While a new version of these programs takes over,
 * both run, and the first has used the approval up.  It also lets an exec that failed half-way be tried
 * again with the same file and arguments until its approval expires, which gains nobody anything.
 */
static int let_through(struct state *state, struct linux_binprm *bprm)
{
	__u64 step = (__u64)state->next - 1; /* as wide as a pointer: the verifier must see that the bound holds */

	if (step >= CHAIN_MAX || (step == 0) != is_first(bprm))
		return 0;
	return state->bprm == (__u64)bprm && state->file == (__u64)bprm->file &&
	       is(&state->approval.chain[step], bprm->file) && bpf_ktime_get_ns() < state->approval.expires &&
	       (step != state->approval.named || is_named(state, bprm));
}

/* Called for the file of an execve, and again for each interpreter that a script names. */
SEC("lsm/bprm_check_security")
int BPF_PROG(check_file, struct linux_binprm *bprm)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct state *state = bpf_task_storage_get(&states, task, 0, 0);
	__u32 tid = (__u32)task->pid;
	struct approval *approval;

	if (!is_first(bprm)) {
		/* An interpreter, and so its script was let through. */
		if (!state)
			return login_is_gated(task) ? refuse(bprm, task, state, 0) : 0;
		if (state->bprm != (__u64)bprm)
			return refuse(bprm, task, state, 0);
		if (follows(state, bprm) || let_through(state, bprm))
			return 0;
		return refuse(bprm, task, state, WHY_OTHER_FILE);
	}
	approval = bpf_map_lookup_elem(&approvals, &tid);
	if (!approval) {
		if (state ? let_through(state, bprm) : !login_is_gated(task))
			return 0;
		return refuse(bprm, task, state, WHY_NO_APPROVAL);
	}
	if (!state)
		state = bpf_task_storage_get(&states, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!state)
		return -EACCES;
	state->approval = *approval;
	bpf_map_delete_elem(&approvals, &tid);
	state->bprm = (__u64)bprm;
	state->file = 0;
	state->next = 0;
	state->tid = tid;
	if (bpf_ktime_get_ns() >= state->approval.expires)
		return refuse(bprm, task, state, WHY_EXPIRED);
	return follows(state, bprm) ? 0 : refuse(bprm, task, state, WHY_OTHER_FILE);
}

/* ---- the loader -------------------------------------------------------------------------------- */

/*
 * An ELF program's interpreter is opened and mapped without a look by check_file.  Once the chain is through,
 * that is all that an exec still opens; what an exec opens first has no exec under way, or, where the one
 * before it failed half-way, an approval of its own, for that very file.
 */
SEC("lsm/file_open")
int BPF_PROG(check_loader, struct file *file)
{
	struct task_struct *task;
	struct state *state;
	struct approval *approval;
	__u32 tid;

	if (!(file->f_flags & FMODE_EXEC))
		return 0;
	task = bpf_get_current_task_btf();
	state = bpf_task_storage_get(&states, task, 0, 0);
	if (!state || state->bprm == 0 || state->next < state->approval.count || is(&state->approval.loader, file))
		return 0;
	tid = (__u32)task->pid;
	approval = bpf_map_lookup_elem(&approvals, &tid);
	if (approval && is(&approval->chain[0], file))
		return 0;
	return refuse_file(file, file->f_path.dentry->d_name.name, task, state, WHY_OTHER_FILE);
}

/* ---- the arguments ----------------------------------------------------------------------------- */

struct comparison {
	__u64 at; /* in the new program's memory */
	__u32 bytes;
	__u32 tid;
	int same;
};

static long compare_block(__u32 number, struct comparison *with)
{
	__u64 block[BLOCK / 8] = {};
	__u32 from = number * BLOCK;
	struct page_key key = { with->tid, from / PAGE_BYTES };
	struct page *page = bpf_map_lookup_elem(&arguments, &key);
	__u32 first = (from % PAGE_BYTES) / 8, size = BLOCK;

	with->same = 0;
	if (!page || from >= with->bytes)
		return 1;
	if (with->bytes - from < BLOCK)
		size = (with->bytes - from) & (BLOCK - 1);
	if (bpf_copy_from_user(block, size, (const void *)(with->at + from)))
		return 1;
	for (__u32 i = 0; i < BLOCK / 8; i++)
		if (block[i] != page->words[(first + i) % (PAGE_BYTES / 8)])
			return 1;
	with->same = 1;
	return 0;
}

static long forget_page(__u32 number, const __u32 *tid)
{
	struct page_key key = { *tid, number };

	bpf_map_delete_elem(&arguments, &key);
	return 0;
}

/* The new program's memory is in place and its stack begins with its arguments; not one instruction has run. */
SEC("lsm.s/bprm_committed_creds")
int BPF_PROG(check_arguments, struct linux_binprm *bprm)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct state *state = bpf_task_storage_get(&states, task, 0, 0);
	struct comparison with;
	__u32 zero = 0, tid, bytes, whole;
	struct settings *set;

	if (!state || state->bprm != (__u64)bprm)
		return 0;
	state->bprm = 0;
	bytes = state->approval.argv_bytes;
	whole = state->next == state->approval.count;
	if (whole && bytes == 0)
		return 0;
	tid = state->tid;
	with.at = bprm->p;
	with.bytes = bytes;
	with.tid = tid;
	with.same = 1;
	if (bytes) {
		bpf_loop((bytes + BLOCK - 1) / BLOCK, compare_block, &with, 0);
		bpf_loop(PAGES_MAX, forget_page, &tid, 0);
	}
	if (whole && with.same && (!state->approval.argc || (__u32)bprm->argc == state->approval.argc))
		return 0;
	set = bpf_map_lookup_elem(&settings, &zero);
	if (!set || set->enforce)
		bpf_send_signal(SIGKILL);
	tell(bprm->file, bprm->filename, task, WHY_OTHER_ARGUMENTS, !set || set->enforce);
	return 0;
}

/* ---- descent ----------------------------------------------------------------------------------- */

/* A child of a gated task is gated, whatever it becomes. */
SEC("lsm/task_alloc")
int BPF_PROG(inherit, struct task_struct *task, unsigned long clone_flags)
{
	if (!bpf_task_storage_get(&states, bpf_get_current_task_btf(), 0, 0))
		return 0;
	return bpf_task_storage_get(&states, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE) ? 0 : -EAGAIN;
}

/* ---- the end ----------------------------------------------------------------------------------- */

/* An exec may fail, or be killed, before check_file sees it: its approval ends with the thread, not its number. */
SEC("tp_btf/sched_process_exit")
int BPF_PROG(end, struct task_struct *task)
{
	__u32 tid = (__u32)task->pid;

	bpf_map_delete_elem(&approvals, &tid);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
