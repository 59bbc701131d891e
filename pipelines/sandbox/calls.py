"""Calls of the kernel that a program in a sandbox may not make: a seccomp filter.

What is refused would give memory that no limit counts (`memfd_create`, System V's shared memory and
queues, `io_uring`, keys), reach into other processes, or make namespaces. All else is limited by
what a process without rights may do.
"""

import ctypes
import os
import struct

# name -> its number with x86_64 and with aarch64 (asm/unistd_64.h, asm-generic/unistd.h)
_REFUSED = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "perf_event_open": (298, 241),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "setns": (308, 268),
    "shmget": (29, 194),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, audit's number
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of classic BPF
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # the second: EPERM
_X32 = 0x40000000  # x86_64's second table of calls begins there
_SET_SECCOMP, _FILTER = 22, 2


def is_known(machine: str) -> bool:
    """Whether the numbers of calls are known for a machine."""
    return machine in _MACHINES


def refuse_calls(libc: ctypes.CDLL) -> None:
    """Refuse the calls above (EPERM) in this process and all that it starts. `no_new_privs` is on.

    Raises:
        OSError: the kernel takes no filter.
    """
    column, audit = _MACHINES[os.uname().machine]
    numbers = sorted(each[column] for each in _REFUSED.values())
    last = len(numbers) + 5  # the instruction that refuses
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 0, last - 2, audit), (_LOAD, 0, 0, 0)]
    lines.append((_AT_LEAST, last - 4, 0, _X32))
    lines += [(_EQUAL, last - 5 - i, 0, number) for i, number in enumerate(numbers)]
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    program = struct.pack("@HP", len(lines), ctypes.addressof(code))
    if libc.prctl(_SET_SECCOMP, _FILTER, ctypes.create_string_buffer(program), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
