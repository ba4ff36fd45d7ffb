"""The system calls that a jailed program may not make, as a classic BPF program (seccomp(2)).

Namespaces hide what is outside; this closes what they leave open: memory that no limit counts
(memfd, System V segments, pages lent to pipes), new namespaces, tracing, keyrings, and the parts
of the kernel where most escapes were found (io_uring, bpf, userfaultfd, user namespaces, all
sockets but Unix ones).
A call refused here fails with EPERM; the program goes on.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct

# name: (x86_64, aarch64); None where the architecture has no such call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vmsplice": (278, 75),
}
CLONE, SOCKET, SOCKETPAIR, CLONE3 = (56, 220), (41, 198), (53, 199), 435
NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
AF_UNIX = 1
X32 = 0x40000000  # calls of x86_64's third ABI, whose numbers the table does not hold
# machine: (column of the table, AUDIT_ARCH_*)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little endian


def program() -> bytes:
    """The filter for this machine, as an array of struct sock_filter. Raises OSError."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise OSError(f"no system-call table for {machine}; there is one for {', '.join(MACHINES)}")
    column, architecture = MACHINES[machine]
    refuse = _RETURN, 0, 0, 0x00050000 | errno.EPERM
    steps = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, X32),
        refuse,
    ]
    for numbers in DENIED.values():
        number = numbers[column]
        steps += [] if number is None else [(_EQUAL, 0, 1, number), refuse]
    # As if the kernel were older: libraries fall back to clone, whose flags can be looked at.
    steps += [(_EQUAL, 0, 1, CLONE3), (_RETURN, 0, 0, 0x00050000 | errno.ENOSYS)]
    steps += [
        (_EQUAL, 0, 3, CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 0, 1, NEW_NAMESPACES),
        refuse,
        # Here A may hold clone's flags, not a number: look at the number again.
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 1, 0, SOCKETPAIR[column]),
        (_EQUAL, 0, 3, SOCKET[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_EQUAL, 1, 0, AF_UNIX),
        refuse,
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


# What would reach the processes around a solution, or make new ones: (x86_64, aarch64).
SIGNALS = ((62, 129), (200, 130), (234, 131), (129, 138), (297, 240))  # kill, tkill, tgkill, ...
ALONE = ((57, None), (58, None), (59, 221), (322, 281), (424, 424), (434, 434))  # fork, exec, pidfd
SETS_OTHERS = ((302, 261), (203, 122), (144, 119), (142, 118), (314, 274), (141, 140))
CLONE_THREAD = 0x10000
FIRST_PID = 3  # of a solution: before it come the watcher and the process of the tests


@functools.cache
def solution() -> bytes:
    """A second filter, for a solution next to its tests: no new process, no signal to another."""
    column, _ = MACHINES[platform.machine()]
    refuse = _RETURN, 0, 0, 0x00050000 | errno.EPERM
    steps = [(_LOAD, 0, 0, _NUMBER)]
    for numbers in ALONE:
        number = numbers[column]
        steps += [] if number is None else [(_EQUAL, 0, 1, number), refuse]
    allow = _RETURN, 0, 0, _ALLOW
    for numbers in SETS_OTHERS:  # only its own, which is 0
        steps += [(_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
        steps += [(_EQUAL, 0, 1, 0), allow, refuse]
    for numbers in SIGNALS:  # a negative number is a group
        steps += [(_EQUAL, 0, 5, numbers[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
        steps += [(_AT_LEAST, 1, 0, 1 << 31), (_AT_LEAST, 1, 0, FIRST_PID), refuse, allow]
    steps += [(_EQUAL, 0, 3, CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT)]
    steps += [(_ANY_BIT, 1, 0, CLONE_THREAD), refuse, allow]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)


def pivot_root_number() -> int:
    """The number of pivot_root(2), which the C library does not wrap."""
    number = DENIED["pivot_root"][MACHINES[platform.machine()][0]]
    assert number is not None
    return number
