/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/*
 * What the agent and the kernel programs share: the contents of the maps.  Its mirror is
 * persona_guest/lsm/abi.py; a change here is a new LAYOUT there.
 */
#ifndef PERSONA_LAYER_H
#define PERSONA_LAYER_H

#define CHAIN_MAX 6 /* a file and five interpreters: exec_binprm() follows no more */
#define PAGE_BYTES 4096
#define PAGES_MAX 17 /* a little over the 64 KiB of arguments that the agent reads */
#define PATH_BYTES 256 /* of a script's path that is compared, with the NUL */
#define NO_ID 0xffffffffu

/* A file while it exists: the device of its super block and its inode number, as the kernel has them. */
struct image {
	__u64 device;
	__u64 inode;
};

/* approvals, by thread id: what this one task may start, once, until it expires. */
struct approval {
	__u64 expires; /* CLOCK_MONOTONIC, ns */
	__u32 count; /* images in the chain: the file, then for a script its interpreters */
	__u32 argc; /* 0: any number, argv[0] alone was looked at */
	__u32 argv_bytes; /* the arguments with their NULs, in "arguments"; 0: the decision did not look */
	__u32 named; /* index in the chain of the script that must be called "path"; CHAIN_MAX: none */
	struct image chain[CHAIN_MAX];
	struct image loader; /* the ELF interpreter of the last in the chain; zeros: none */
	__u64 path[PATH_BYTES / 8]; /* filled up with zeros */
};

/* arguments, by thread and page: the approved command line, the last page filled up with zeros. */
struct page_key {
	__u32 tid;
	__u32 number;
};

struct page {
	__u64 words[PAGE_BYTES / 8];
};

/* settings, one entry. */
struct settings {
	__u32 enforce; /* 0: complain, record what would be stopped */
	__u32 uid_min; /* logins of root and of system accounts are not gated: accounts.h */
	__u32 break_glass; /* a group whose members are not gated; NO_ID: none */
	__u32 unused;
};

enum why {
	WHY_NO_APPROVAL = 1,
	WHY_EXPIRED = 2,
	WHY_OTHER_FILE = 3,
	WHY_OTHER_ARGUMENTS = 4,
};

/* events, a ring buffer. */
struct event {
	__u32 why;
	__u32 enforced; /* stopped or killed; 0: complain mode, it went on */
	__u32 tid;
	__u32 tgid;
	__u32 uid;
	__u32 loginuid;
	__u32 sessionid;
	__u32 unused;
	struct image image;
	char comm[16];
	char path[256]; /* as the task gave it */
};

/* counters, one entry each. */
enum counter {
	COUNT_STOPPED = 0,
	COUNT_WOULD_STOP = 1,
	COUNT_KILLED = 2,
	COUNT_LOST = 3, /* events that found the ring buffer full */
	COUNTERS = 4,
};

#endif
