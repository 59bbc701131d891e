"""A program that tries what a sandbox must forbid, and tests that say what it could do."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

SOLUTION = """
import os, socket, time

def possible(action):
    try:
        action()
    except BaseException:
        return False
    return True

def connect(port):
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        pass

def read(path):
    with open(path) as file:
        file.read(1)

def write(path, size):
    with open(path, "wb") as file:
        file.write(bytes(size))

def fork(count):
    children = []
    try:
        for _ in range(count):
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)

def look(path, port, prefix, processes):
    possible(lambda: os.kill(1, 9))  # were that possible, there would be no answer
    return {
        "computes": sum(range(10)) == 45,
        "writes in its folder": possible(lambda: write("here", 10)),
        "starts processes": processes == 0 or possible(lambda: fork(1)),
        "reaches the network": possible(lambda: connect(port)),
        "reads a file outside": possible(lambda: read(path)),
        "reads /etc/passwd": possible(lambda: read("/etc/passwd")),
        "reads /proc": os.path.exists("/proc/self"),
        "writes outside its folder": possible(lambda: write("/x", 1))
        or possible(lambda: write(prefix + "/sandbox-probe", 1)),
        "writes a large file": possible(lambda: write("large", 8 << 20)),
        "takes more memory": possible(lambda: bytearray(1 << 30)),
        "starts more processes": possible(lambda: fork(processes + 8)),
        "becomes root": possible(lambda: os.setuid(0)),
        "takes memory that no limit counts": possible(lambda: os.memfd_create("x")),
    }
"""
TESTS = """
found = look({path!r}, {port}, {prefix!r}, {processes})
wanted = ["computes", "writes in its folder", "starts processes"]
lacking = [name for name in wanted if found[name] is not True]
assert not lacking, "a program there does not do this: " + ", ".join(lacking)
broken = [name for name, done in found.items() if done and name not in wanted]
assert not broken, "a program there " + ", ".join(broken)
"""


@contextmanager
def listener() -> Iterator[int]:
    """A port of this machine that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]
