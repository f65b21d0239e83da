"""Which connections have an answer that is meant to last: the worker ends any other after some seconds."""

import socket
from weakref import WeakSet

STUCK_MAX_S = 30.0  # how long a stream's client may leave everything unread

_lasting: WeakSet[socket.socket] = WeakSet()


def let_last(connection: socket.socket) -> None:
    """Excepts a connection (``gunicorn.socket`` of the request) whose answer is meant to last.

    It still ends when its client takes nothing off it for ``STUCK_MAX_S``.
    """
    connection.settimeout(STUCK_MAX_S)
    if connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STUCK_MAX_S * 1000))
    _lasting.add(connection)


def is_lasting(connection: socket.socket) -> bool:
    """Whether ``let_last`` was called with it."""
    return connection in _lasting
