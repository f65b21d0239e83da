"""The notifications that are received and not answered yet, in memory that outlives the agent.

The kernel delivers a notification once.  An agent that dies in between would leave its task waiting
for ever; so each is written to a memfd that systemd keeps (FDSTORE), and the next agent judges it
anew.  One in whose reading two agents ended may be what they died of: it is not read a third time.
"""

import mmap
import os
import struct

from persona_guest.kernel.seccomp import NOTIF_SIZE

SLOTS = 4096
_NAME_SIZE = 40
_FREE, _READING, _READING_AGAIN, _READ = range(4)  # the first byte of a slot
_SLOT = struct.Struct(f"=B7x{_NAME_SIZE}s{NOTIF_SIZE}s")


class InFlight:
    """A fixed table in shared memory; to take or clear a slot is a copy, and no system call."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("persona-inflight", os.MFD_CLOEXEC)
            os.ftruncate(fd, SLOTS * _SLOT.size)
        self.fd = fd
        if os.fstat(fd).st_size != SLOTS * _SLOT.size:
            raise ValueError("the table of notifications in flight has another size: another version's")
        self._map = mmap.mmap(fd, SLOTS * _SLOT.size)
        self._free = [slot for slot in range(SLOTS - 1, -1, -1) if not self._map[slot * _SLOT.size]]

    @classmethod
    def of_this_process(cls) -> "InFlight":
        """A table that no other process will see: it needs no descriptor."""
        table = cls.__new__(cls)
        table.fd = -1
        table._map = mmap.mmap(-1, SLOTS * _SLOT.size)
        table._free = list(range(SLOTS - 1, -1, -1))
        return table

    def put(self, session_id: bytes, raw: bytes | bytearray) -> int:
        """Keeps a raw struct seccomp_notif; returns the slot to clear, or -1 where the table is full."""
        if not self._free:
            return -1
        slot = self._free.pop()
        _SLOT.pack_into(self._map, slot * _SLOT.size, _READING, session_id, raw)
        return slot

    def mark_read(self, slot: int) -> None:
        """Says of a slot that its task's memory has been read and done no harm; it waits for an answer."""
        if slot >= 0:
            self._map[slot * _SLOT.size] = _READ

    def clear(self, slot: int) -> None:
        """Frees the slot of an answered notification; a second time does nothing, or two would share the slot."""
        if slot >= 0 and self._map[slot * _SLOT.size] != _FREE:
            self._map[slot * _SLOT.size] = _FREE
            self._free.append(slot)

    def close(self) -> None:
        """Unmaps and closes the table here; systemd keeps its own descriptor."""
        self._map.close()
        os.close(self.fd)

    def left_over(self) -> list[tuple[int, str, bytes, bool]]:
        """(slot, session, raw struct, whether to read it) of everything that an earlier agent did not answer."""
        found = []
        for slot in range(SLOTS):
            used, name, raw = _SLOT.unpack_from(self._map, slot * _SLOT.size)
            if used != _FREE:
                self._map[slot * _SLOT.size] = _READING_AGAIN
                found.append((slot, name.rstrip(b"\0").decode("ascii", "replace"), raw, used != _READING_AGAIN))
        return found
