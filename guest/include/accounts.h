/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
/*
 * Which accounts are root's and the system's, by their number alone: those are never gated.  One text for
 * the PAM module and for the kernel layer; persona_guest/core/accounts.py is its mirror in the agent, and
 * tests/identities.py runs one table through all of them.
 */
#ifndef PERSONA_ACCOUNTS_H
#define PERSONA_ACCOUNTS_H

#include <linux/types.h>

/* Debian Policy 9.2.2, "globally allocated by the Debian project", less what systemd-homed has for people. */
#define SYSTEM_FIRST 60514u
#define SYSTEM_LAST 64999u
#define UID_NOBODY 65534u
#define UID_16_BIT_NONE 65535u /* what -1 was when a uid had 16 bits: never to be given to a person */

/* uid_min: UID_MIN of login.defs(5), the first number that people get. */
static inline int is_root_or_system(__u32 uid, __u32 uid_min)
{
	return uid == 0 || uid < uid_min || (uid >= SYSTEM_FIRST && uid <= SYSTEM_LAST) || uid == UID_NOBODY ||
	       uid == UID_16_BIT_NONE;
}

#endif
