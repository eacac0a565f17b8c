"""Signals to the launcher, turned into something that its loop can read."""

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalInbox:
    """Collects SIGINT, SIGTERM and SIGHUP while it is open, instead of letting them end this process.

    SIGHUP stays ignored where it is (under nohup). Outside the main thread, where Python allows no handlers,
    nothing is collected.

    Args:
        on_repeat: Called right inside the handler, from the second signal on: the loop may be blocked then.
    """

    def __init__(self, on_repeat: Callable[[], None]) -> None:
        self.received: list[signal.Signals] = []
        self._on_repeat = on_repeat
        self._previous: dict[signal.Signals, Any] = {}
        self._reader, self._writer = socket.socketpair()

    def __enter__(self) -> "SignalInbox":
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            for number in _FORWARDED:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if self._previous:
            signal.set_wakeup_fd(self._previous_fd)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """The descriptor that becomes readable when a signal arrives."""
        return self._reader.fileno()

    def clear(self) -> None:
        """Makes the descriptor unreadable again; `received` stays."""
        try:
            while self._reader.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        if len(self.received) > 1:
            self._on_repeat()
