import socket

import pytest

from baton_connector import frames


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_messages_pass_whole_however_they_are_cut(pair) -> None:
    ours, theirs = pair
    data = frames.encode({"type": "a", "text": "ü"}) + frames.encode({"type": "b"})
    assert data[:4] == (len(data[4:]) - len(frames.encode({"type": "b"}))).to_bytes(4, "little")
    for byte in data:
        theirs.send(bytes([byte]))
    theirs.close()
    assert frames.receive(ours) == {"type": "a", "text": "ü"}
    assert frames.receive(ours) == {"type": "b"}
    assert frames.receive(ours) is None


@pytest.mark.parametrize(
    "data",
    [
        b"\x01\0",
        b"\x02\0\0\0{",
        b"\x02\0\0\0{]",
        b"\x02\0\0\0[]",
        b"\x02\0\0\0{}",
        b"\xff\xff\xff\xff",
        b"\x02\0\0\0\xff\xff",
    ],
)
def test_garbage_is_an_error(pair, data: bytes) -> None:
    ours, theirs = pair
    theirs.send(data)
    theirs.close()
    with pytest.raises(frames.FrameError):
        frames.receive(ours)


def test_a_frame_too_long_is_not_sent() -> None:
    with pytest.raises(frames.FrameError):
        frames.encode({"type": "x" * frames.MAX_FRAME_BYTES})
