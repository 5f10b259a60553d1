"""Frames on the worker's socket: a length as little-endian ``u32``, then that much JSON."""

import json
import socket
import struct
from typing import Any

MAX_FRAME_BYTES = 16 << 20
_LENGTH = struct.Struct("<I")


class FrameError(Exception):
    """The peer broke the protocol, or ended inside a frame."""


def encode(message: dict[str, Any]) -> bytes:
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is too long to send")
    return _LENGTH.pack(len(body)) + body


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message; ``None`` where the peer closed between frames. Raises ``OSError`` too."""
    head = _receive_exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes is too long")
    body = _receive_exactly(connection, length)
    if body is None:
        raise FrameError("the connection ended inside a frame")
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FrameError("a frame is not JSON") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise FrameError("a frame is not a message")
    return message


def _receive_exactly(connection: socket.socket, length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            if data:
                raise FrameError("the connection ended inside a frame")
            return None
        data += part
    return bytes(data)
