/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/*
 * The few kernel structures that persona.bpf.c reads, with only the members that it reads.  libbpf finds
 * where each lies in the running kernel (CO-RE), so this builds on a machine that has no BTF and the
 * result loads on any kernel that has it.
 */
#ifndef PERSONA_KERNEL_TYPES_H
#define PERSONA_KERNEL_TYPES_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	unsigned int val;
} kuid_t;

typedef struct {
	unsigned int val;
} kgid_t;

struct super_block {
	unsigned int s_dev;
};

struct inode {
	struct super_block *i_sb;
	unsigned long i_ino;
};

struct qstr {
	const unsigned char *name;
};

struct dentry {
	struct qstr d_name;
};

struct path {
	struct dentry *dentry;
};

struct file {
	struct path f_path;
	struct inode *f_inode;
	unsigned int f_flags;
};

struct group_info {
	int ngroups;
	kgid_t gid[0];
};

struct cred {
	kuid_t uid;
	kgid_t gid;
	kuid_t suid;
	kuid_t euid;
	kuid_t fsuid;
	struct group_info *group_info;
};

struct seccomp {
	int mode;
};

struct task_struct {
	int pid;
	int tgid;
	const struct cred *cred;
	kuid_t loginuid;
	unsigned int sessionid;
	struct seccomp seccomp;
};

struct linux_binprm {
	unsigned long p;
	struct file *file;
	int argc;
	const char *filename;
	const char *interp;
	char buf[256];
};

#pragma clang attribute pop

#endif
