"""Each engine on a CPU has cores of its own, so that two do not wait for each other's threads.

Ray counts cores and gives none away. So the engines of one machine share a folder with a file for
each core; whoever holds a file's lock has the core. The system releases the lock when the process
ends, however it ends.
"""

import fcntl
import os
from pathlib import Path


class Cores:
    """The cores of this process; they are its own until it ends.

    Args:
        count: how many are wanted.
        folder: of the locks; the engines of one server share it.

    Attributes:
        taken: their numbers; empty where the machine has too few, and nothing changes then.
    """

    def __init__(self, count: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._locks: list[int] = []
        self.taken: list[int] = []
        for core in sorted(os.sched_getaffinity(0)):
            lock = os.open(folder / f"core-{core}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            self._locks.append(lock)
            self.taken.append(core)
            if len(self.taken) == count:
                return
        self.release()

    def bind(self) -> None:
        """Run this process's threads, and those that they start, on its cores alone."""
        if not self.taken:
            return
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), self.taken)

    def release(self) -> None:
        """Give the cores back."""
        for lock in self._locks:
            os.close(lock)
        self._locks, self.taken = [], []
