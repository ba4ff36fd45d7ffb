"""Builds the jail around one program, from within: run as a script, in a process of its own.

    python -I -S inside.py SETUP_JSON

Three processes: this one enters the namespaces; its child is process 1 of the new ones, builds a
root of read-only mounts, watches time, memory and processes, and when it ends the kernel kills all
that is left there; the grandchild gives up every right and becomes the program. It imports nothing
of tessera, so that what surrounds untrusted code can be read in one file.

How the program ended goes as JSON to the descriptor `status`, which the program does not inherit.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any, NoReturn

NOBODY = 65534
LOOK_SECONDS = 0.02  # between two looks at memory and processes: what a bomb can gain in that time
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWUTS = 0x40000000, 0x8000000, 0x4000000
CLONE_NEWCGROUP = 0x2000000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
AT_FDCWD, AT_RECURSIVE, MNT_DETACH = -100, 0x8000, 2
MOUNT_SETATTR = 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
CAP_SETUID, CAP_SYS_ADMIN, CAP_LAST = 7, 21, 63
DEVICES = ("null", "zero", "full", "random", "urandom")
ROOT = "/proc"  # exists everywhere, and is covered by the new root until the pivot

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, argument: Any = 0, third: Any = 0) -> None:
    zero = ctypes.c_ulong(0)
    checked(libc.prctl(option, ctypes.c_ulong(argument), third, zero, zero), f"prctl({option})")


def unshare(flags: int, what: str) -> None:
    checked(libc.unshare(flags), f"unshare of {what}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    words = [word.encode() for word in (source, target, kind)]
    checked(libc.mount(*words, ctypes.c_ulong(flags), data.encode()), f"mount on {target}")


def set_attributes(path: str, attributes: int, recursive: bool) -> None:
    """mount_setattr(2): adds attributes to a mount, and to all below it, and takes none away."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    result = libc.syscall(
        ctypes.c_long(MOUNT_SETATTR), AT_FDCWD, path.encode(), flags, wanted, ctypes.c_size_t(32)
    )
    checked(result, f"mount_setattr on {path}")


def die_with_parent(parent: int) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def has_rights() -> bool:
    """Whether this process may make namespaces and change its user without a user namespace."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("CapEff:"))
    rights = int(line.split()[1], 16)
    return all(rights >> capability & 1 for capability in (CAP_SETUID, CAP_SYS_ADMIN))


def enter_namespaces(privileged: bool) -> None:
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    flags |= CLONE_NEWCGROUP
    user, group = os.getuid(), os.getgid()
    unshare(flags if privileged else flags | CLONE_NEWUSER, "namespaces")
    if not privileged:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{NOBODY} {user} 1")
        write("/proc/self/gid_map", f"{NOBODY} {group} 1")


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def build_root(setup: dict[str, Any]) -> None:
    """A root of read-only binds, a private /tmp, a /proc of this namespace; the old one is gone."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    size = "size=1m,nr_inodes=4k,mode=755"
    mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.makedirs(f"{ROOT}/tmp")
    size = f"size={setup['tmp_bytes']},nr_inodes=4k,mode=1777"
    mount("tmpfs", f"{ROOT}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    for path in setup["visible"]:
        bind(path, ROOT + path, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV)
    for name in DEVICES:
        bind(f"/dev/{name}", f"{ROOT}/dev/{name}", ATTR_NOSUID | ATTR_NOEXEC)
    for link, target in (("fd", "/proc/self/fd"), ("shm", "/tmp")):
        os.symlink(target, f"{ROOT}/dev/{link}")
    os.makedirs(f"{ROOT}/proc")
    mount("proc", f"{ROOT}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    set_attributes(f"{ROOT}/proc", ATTR_RDONLY, recursive=False)
    set_attributes(ROOT, ATTR_RDONLY, recursive=False)
    os.chdir(ROOT)
    checked(libc.syscall(ctypes.c_long(setup["pivot_root"]), b".", b"."), "pivot_root")
    checked(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/tmp")


def bind(source: str, target: str, attributes: int) -> None:
    """Shows a path at its place in the new root; a symbolic link is made again."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    mount(source, target, "", MS_BIND | MS_REC)
    set_attributes(target, attributes, recursive=True)


def become_program(setup: dict[str, Any], privileged: bool) -> NoReturn:
    """Gives up every right, sets the limits and starts the program."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if privileged:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # In a user namespace of its own, RLIMIT_NPROC counts this jail's processes alone.
        unshare(CLONE_NEWUSER, "the user namespace")
    for capability in range(CAP_LAST + 1):
        if libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break  # beyond the last one that this kernel knows
    # Without rights of their own, this namespace also holds the two processes around the program.
    set_limits(setup, setup["processes"] + (0 if privileged else 2))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    install_filter(bytes.fromhex(setup["filter"]))
    os.execve(setup["argv"][0], setup["argv"], setup["environment"])


def set_limits(setup: dict[str, Any], processes: int) -> None:
    for limit, value in (
        (resource.RLIMIT_AS, setup["memory_bytes"]),
        (resource.RLIMIT_CPU, setup["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, setup["tmp_bytes"]),
        (resource.RLIMIT_NOFILE, setup["open_files"]),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, most = resource.getrlimit(limit)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))


def install_filter(code: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    held = Program(len(code) // 8, code)
    prctl(PR_SET_SECCOMP, 2, ctypes.byref(held))


def use_of_memory() -> tuple[int, int, bool]:
    """Processes of the namespace but this one, the bytes that they hold and share, and whether one
    of their threads computes, waits for a core or waits for the disk."""
    processes, total, awake = 0, 0, False
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        processes += 1
        try:
            with open(f"/proc/{name}/status", errors="replace") as file:
                lines = file.read().splitlines()
        except OSError:
            continue  # it has ended
        for line in lines:
            if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
                total += int(line.split()[1]) * 1024
        awake = awake or is_awake(name)
    return processes, total, awake


def is_awake(process: str) -> bool:
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/stat", errors="replace") as file:
                if file.read().rpartition(")")[2].split()[0] in "RD":
                    return True
    except OSError:
        return True  # one has just ended
    return False


def use_of_cpu() -> float:
    """CPU seconds of the processes of the namespace but this one, also of those that ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/stat", errors="replace") as file:
                    ticks += sum(map(int, file.read().rpartition(")")[2].split()[11:15]))
            except OSError:
                continue  # it has ended
    return ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def how_it_exited(setup: dict[str, Any], status: int) -> dict[str, Any]:
    """By itself, or killed by the kernel when its CPU time was used up."""
    code = os.waitstatus_to_exitcode(status)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = used.ru_utime + used.ru_stime >= setup["cpu_seconds"] - 0.1
    killed = code in (-signal.SIGKILL, -signal.SIGXCPU)
    return {"reason": "cpu"} if killed and spent else {"reason": "exited", "code": code}


def watch(setup: dict[str, Any], program: int) -> dict[str, Any]:
    """Waits for the program, or for the first limit that it breaks, and reaps what it leaves."""
    last, asleep = time.monotonic(), 0.0
    deadline = last + setup["seconds"]
    while True:
        signal.sigtimedwait([signal.SIGCHLD], LOOK_SECONDS)
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == program and not os.WIFSTOPPED(status):
                return how_it_exited(setup, status)
        if time.monotonic() > deadline:
            spent = use_of_cpu() >= setup["cpu_seconds"]
            return {"reason": "cpu" if spent else "time"}
        processes, memory, awake = use_of_memory()
        now = time.monotonic()
        # Between two looks of a busy machine much time passes, and a little of it is known of.
        asleep, last = asleep + (not awake) * min(now - last, LOOK_SECONDS), now
        if asleep > setup["asleep_seconds"]:
            return {"reason": "asleep"}
        if memory > setup["memory_bytes"]:
            return {"reason": "memory"}
        if processes > setup["processes"] + 2:
            return {"reason": "processes"}


def process_one(setup: dict[str, Any], privileged: bool, alive: int) -> NoReturn:
    """Process 1 of the namespaces: whatever happens, it reports and ends, and all with it."""
    report: dict[str, Any] = {"reason": "setup", "error": "unknown"}
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([alive], [], [], 0)[0]:
            os._exit(1)  # the parent died before PR_SET_PDEATHSIG was set
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a program may send it
        build_root(setup)
        prctl(PR_SET_DUMPABLE, 0)
        errors, channel = os.pipe()
        program = os.fork()
        if not program:
            start(setup, privileged, channel)
        os.close(channel)
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        refused = os.read(errors, 4096).decode()
        report = {"reason": "setup", "error": refused} if refused else watch(setup, program)
    except BaseException as error:
        report = {"reason": "setup", "error": str(error)}
    os.write(setup["status"], json.dumps(report).encode())
    os._exit(0)


def start(setup: dict[str, Any], privileged: bool, channel: int) -> NoReturn:
    """`become_program`, sending process 1 the error if the program could not begin."""
    if channel != 3:
        os.dup2(channel, 3)
    os.set_inheritable(3, False)
    os.closerange(4, 1 << 20)
    try:
        become_program(setup, privileged)
    except BaseException as error:
        os.write(3, f"{error}".encode())
        os._exit(1)


def run_without_isolation(setup: dict[str, Any]) -> NoReturn:
    """Runs the program with its limits and no isolation, for users who configured that."""
    program = os.fork()
    if not program:
        set_limits(setup, resource.getrlimit(resource.RLIMIT_NPROC)[1])
        os.close(setup["status"])
        os.execve(setup["argv"][0], setup["argv"], setup["environment"])
    _, status = os.waitpid(program, 0)
    report = how_it_exited(setup, status)
    os.write(setup["status"], json.dumps(report).encode())
    os._exit(0)


def main() -> NoReturn:
    setup = json.loads(sys.argv[1])
    if not setup["isolated"]:
        run_without_isolation(setup)
    try:
        die_with_parent(setup["parent"])
        privileged = has_rights()
        enter_namespaces(privileged)
    except OSError as error:
        os.write(setup["status"], json.dumps({"reason": "setup", "error": str(error)}).encode())
        os._exit(1)
    alive, held = os.pipe()
    child = os.fork()
    if not child:
        os.close(held)
        process_one(setup, privileged, alive)
    os.waitpid(child, 0)
    os._exit(0)


if __name__ == "__main__":
    main()
