/* SPDX-License-Identifier: BSD-2-Clause OR GPL-2.0 */
#define _GNU_SOURCE
#include "wire.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x314e5350u /* "PSN1" */
#define PACKET_MAX 8192

struct head {
	uint32_t magic;
	uint16_t op;
	uint16_t count;
};

long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static bool wait_for(int fd, short events, long deadline)
{
	for (;;) {
		struct pollfd ready = { fd, events, 0 };
		long left = deadline - now_ms();
		int found;

		if (left <= 0) {
			errno = ETIMEDOUT;
			return false;
		}
		found = poll(&ready, 1, (int)left);
		if (found > 0)
			return true;
		if (found == 0)
			errno = ETIMEDOUT;
		if (found < 0 && errno == EINTR)
			continue;
		return false;
	}
}

/* Only root's agent is believed: whoever could put a socket there could let anybody in. */
static bool peer_is_trusted(int fd)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0)
		return false;
	/* Not running as root: a test of the stack by an ordinary user, with an agent of their own. */
	return peer.uid == 0 || (geteuid() != 0 && peer.uid == geteuid());
}

int wire_connect(const char *path, long deadline)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd;

	if (strlen(path) >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(address.sun_path, path, strlen(path) + 1);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -1;
	while (connect(fd, (const struct sockaddr *)&address, sizeof(address)) < 0) {
		struct timespec pause = { 0, 20 * 1000 * 1000 };
		if ((errno != EAGAIN && errno != EINTR) || now_ms() >= deadline) {
			close(fd);
			return -1;
		}
		nanosleep(&pause, NULL); /* EAGAIN: its queue is full right now */
	}
	if (!peer_is_trusted(fd)) {
		close(fd);
		errno = EPERM;
		return -1;
	}
	return fd;
}

static bool send_packet(int fd, const void *data, size_t size, int passed, long deadline)
{
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { { 0 } };
	struct iovec part = { (void *)(uintptr_t)data, size };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	if (passed >= 0) {
		struct cmsghdr *item;
		message.msg_control = control.space;
		message.msg_controllen = sizeof(control.space);
		item = CMSG_FIRSTHDR(&message);
		item->cmsg_level = SOL_SOCKET;
		item->cmsg_type = SCM_RIGHTS;
		item->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(item), &passed, sizeof(int));
	}
	for (;;) {
		if (sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)size)
			return true;
		if (errno != EAGAIN && errno != EINTR)
			return false;
		if (!wait_for(fd, POLLOUT, deadline))
			return false;
	}
}

bool wire_send(int fd, enum op op, int passed, long deadline)
{
	struct head head = { MAGIC, (uint16_t)op, 0 };

	return send_packet(fd, &head, sizeof(head), passed, deadline);
}

/* Cut where it is too long: for what is only recorded. */
static void append(char *packet, size_t *size, const char *string)
{
	size_t length = strnlen(string, STRING_MAX);

	memcpy(packet + *size, string, length);
	packet[*size + length] = '\0';
	*size += length + 1;
}

bool wire_add_name(struct names *names, const char *name)
{
	size_t length = strlen(name) + 1;

	if (length > STRING_MAX + 1)
		return true;
	if (names->size + length > names->room) {
		size_t room = names->room == 0 ? PACKET_MAX : names->room * 2;
		char *larger = realloc(names->text, room);

		if (larger == NULL)
			return false;
		names->text = larger;
		names->room = room;
	}
	memcpy(names->text + names->size, name, length);
	names->size += length;
	names->count++;
	return true;
}

/* Names that fit into ``room`` bytes, from *at on; *at is moved behind them. */
static uint16_t append_names(char *packet, size_t *size, size_t room, const struct names *names, size_t *at)
{
	uint16_t count = 0;

	while (*at < names->size && count < GROUPS_PER_PACKET) {
		size_t length = strlen(names->text + *at) + 1;
		if (*size + length > room)
			break;
		memcpy(packet + *size, names->text + *at, length);
		*size += length;
		*at += length;
		count++;
	}
	return count;
}

bool wire_send_caller(int fd, enum op op, const struct caller *caller, long deadline)
{
	char packet[PACKET_MAX];
	struct head head = { MAGIC, (uint16_t)op, 0 };
	size_t at = 0, size, begins = sizeof(head) + sizeof(caller->uid);

	if (strlen(caller->user) > STRING_MAX) {
		errno = ENAMETOOLONG;
		return false;
	}
	memcpy(packet + sizeof(head), &caller->uid, sizeof(caller->uid));
	append(packet, &begins, caller->service);
	append(packet, &begins, caller->user);
	append(packet, &begins, caller->remote);
	append(packet, &begins, strlen(caller->shell) > STRING_MAX ? "" : caller->shell); /* no other file's path */
	/* What does not fit beside that goes before it; nearly always everything fits. */
	if (caller->groups->count > GROUPS_PER_PACKET || begins + caller->groups->size > PACKET_MAX) {
		while (at < caller->groups->size) {
			char names[PACKET_MAX];
			struct head of_names = { MAGIC, OP_GROUPS, 0 };

			size = sizeof(of_names);
			of_names.count = append_names(names, &size, sizeof(names), caller->groups, &at);
			memcpy(names, &of_names, sizeof(of_names));
			if (!send_packet(fd, names, size, -1, deadline))
				return false;
		}
	}
	size = begins;
	head.count = append_names(packet, &size, sizeof(packet), caller->groups, &at);
	memcpy(packet, &head, sizeof(head));
	return send_packet(fd, packet, size, -1, deadline);
}

/* One packet; *passed is the descriptor that came with it, or -1. */
static ssize_t receive_packet(int fd, char *packet, int *passed, long deadline)
{
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = { packet, PACKET_MAX };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.space };
	struct cmsghdr *item;
	ssize_t size;

	*passed = -1;
	do {
		if (!wait_for(fd, POLLIN, deadline))
			return -1;
		message.msg_controllen = sizeof(control.space);
		size = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	} while (size < 0 && (errno == EAGAIN || errno == EINTR));
	if (size < 0)
		return -1;
	if (message.msg_flags & MSG_CTRUNC) { /* no descriptor left for the one that came: never go on without it */
		errno = EMFILE;
		return -1;
	}
	item = CMSG_FIRSTHDR(&message);
	if (item != NULL && item->cmsg_level == SOL_SOCKET && item->cmsg_type == SCM_RIGHTS &&
	    item->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(passed, CMSG_DATA(item), sizeof(int));
	return size;
}

static bool parse(const char *packet, size_t size, struct reply *reply)
{
	struct head head;
	size_t filter_size, message_size;

	errno = EPROTO;
	if (size < sizeof(head) + 1)
		return false;
	memcpy(&head, packet, sizeof(head));
	filter_size = head.count * sizeof(struct sock_filter);
	if (head.magic != MAGIC || head.op > VERDICT_DONE || head.count > FILTER_MAX ||
	    size < sizeof(head) + filter_size + 1)
		return false;
	message_size = size - sizeof(head) - filter_size;
	if (message_size > sizeof(reply->message) || packet[size - 1] != '\0')
		return false;
	reply->verdict = (enum verdict)head.op;
	reply->filter_count = head.count;
	memcpy(reply->filter, packet + sizeof(head), filter_size);
	memcpy(reply->message, packet + sizeof(head) + filter_size, message_size);
	if (strlen(reply->message) + 1 != message_size)
		return false;
	for (char *c = reply->message; *c != '\0'; c++)
		if ((unsigned char)*c < 0x20 || *c == 0x7f)
			*c = '?'; /* no message may drive a terminal */
	return true;
}

bool wire_receive(int fd, struct reply *reply, long deadline)
{
	char packet[PACKET_MAX];
	ssize_t size = receive_packet(fd, packet, &reply->ruleset, deadline);

	if (size > 0 && parse(packet, (size_t)size, reply))
		return true;
	if (size == 0)
		errno = ECONNRESET;
	wire_discard(reply);
	return false;
}

void wire_discard(struct reply *reply)
{
	int error = errno;

	if (reply->ruleset >= 0)
		close(reply->ruleset);
	reply->ruleset = -1;
	errno = error;
}
