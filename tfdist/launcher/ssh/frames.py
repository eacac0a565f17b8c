"""What a far task's agent and its launcher say to each other over one byte stream: frames of a kind and a content."""

from collections.abc import Iterator

HELLO, STDOUT, STDERR, BEAT, STATE, PMI = b"h", b"o", b"e", b"b", b"s", b"p"
# Whatever a login shell prints before the first frame is passed over up to here.
START = b"\x00tfdist\x00"
_HEADER_BYTES = 5


def render_frame(kind: bytes, content: bytes) -> bytes:
    """Makes a frame."""
    return kind + len(content).to_bytes(_HEADER_BYTES - 1, "big") + content


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._data = b""
        self._has_started = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Takes what was read, cut anywhere; yields kind and content of each frame that is whole."""
        self._data += data
        if not self._has_started:
            _, start, rest = self._data.partition(START)
            if not start:
                return
            self._has_started, self._data = True, rest
        while len(self._data) >= _HEADER_BYTES:
            end = _HEADER_BYTES + int.from_bytes(self._data[1:_HEADER_BYTES], "big")
            if len(self._data) < end:
                return
            kind, content = self._data[:1], self._data[_HEADER_BYTES:end]
            self._data = self._data[end:]
            yield kind, content
