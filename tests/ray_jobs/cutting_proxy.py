"""A TCP proxy on loopback that cuts what runs through it."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

PIECE = 65536
ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, as a cable that is pulled


class CuttingProxy:
    """Passes bytes between its own port and the address behind it, until `cut`."""

    def __init__(self, behind: str) -> None:
        parts = urlsplit(behind)
        self._behind = (parts.hostname, parts.port)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._refuses_until = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_cuts = 0
        self.num_made = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float) -> bool:
        """Reset all connections and let none through for some seconds; False if there was none."""
        with self._lock:
            there, self._open = self._open, set()
            if there:
                self._refuses_until = time.monotonic() + seconds
        for end in there:
            _abort(end)
        self.num_cuts += bool(there)
        return bool(there)

    def cut_often(self, times: int, every_s: float, after: int) -> threading.Thread:
        """Cut so many times where there is something to cut, from a thread of its own, once some
        connections have been made.
        """

        def run() -> None:
            while self.num_cuts < times:
                if self.num_made > after and self.cut(every_s / 2):
                    time.sleep(every_s)
                time.sleep(0.01)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Let nothing through any more."""
        self._listener.close()
        self.cut(0)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if time.monotonic() < self._refuses_until:
                    _abort(near)
                    continue
                far = socket.create_connection(self._behind)
                with self._lock:
                    self._open |= {near, far}
                self.num_made += 1
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE):
                target.sendall(piece)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._open.discard(end)


def _abort(end: socket.socket) -> None:
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
    end.close()


@contextmanager
def cutting_proxy(behind: str) -> Iterator[CuttingProxy]:
    """A proxy before an address, for the block."""
    proxy = CuttingProxy(behind)
    try:
        yield proxy
    finally:
        proxy.close()
