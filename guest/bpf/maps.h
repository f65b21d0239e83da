/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/* What the programs keep, and how they tell what they stopped.  The agent's side of it is lsm/abi.py. */
#ifndef PERSONA_MAPS_H
#define PERSONA_MAPS_H

/* A gated task: that there is one says that it is gated. */
struct state {
	struct approval approval;
	__u64 bprm; /* the exec under way, by its address; 0: none */
	__u64 file; /* of the last step that was let through */
	__u32 next; /* index in the chain */
	__u32 tid; /* under which the arguments lie: an exec from a thread changes it */
	__u64 path[PATH_BYTES / 8]; /* the path that arrived: the stack has no room */
	__u64 differs; /* it, from the one that was approved; 0: in nothing */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u32);
	__type(value, struct approval);
} approvals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 8192);
	__type(key, struct page_key);
	__type(value, struct page);
} arguments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct state);
} states SEC(".maps");

/* Audit sessions that a member of the break-glass group opened: their sudo to somebody else stays free. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u32);
} free_sessions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

static void count(__u32 which)
{
	__u64 *counter = bpf_map_lookup_elem(&counters, &which);

	if (counter)
		__sync_fetch_and_add(counter, 1);
}

static void tell(const struct file *file, const void *path, struct task_struct *task, __u32 why, __u32 enforced)
{
	struct event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (!enforced)
		count(COUNT_WOULD_STOP);
	else
		count(why == WHY_OTHER_ARGUMENTS ? COUNT_KILLED : COUNT_STOPPED);
	if (!event) {
		count(COUNT_LOST);
		return;
	}
	event->why = why;
	event->enforced = enforced;
	event->tid = (__u32)task->pid;
	event->tgid = (__u32)task->tgid;
	event->uid = task->cred->uid.val;
	event->loginuid = task->loginuid.val;
	event->sessionid = task->sessionid;
	event->unused = 0;
	event->image.device = file->f_inode->i_sb->s_dev;
	event->image.inode = file->f_inode->i_ino;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
	if (bpf_probe_read_kernel_str(event->path, sizeof(event->path), path) < 0)
		event->path[0] = '\0';
	bpf_ringbuf_submit(event, 0);
}

#endif
