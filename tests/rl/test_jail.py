"""The jail: what a program may do in it, ways out of it, and what happens where there is none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessera.rl.jail import run as jail
from tessera.rl.jail.run import Ended, JailError, Limits, python, require_isolation, run

QUICK = Limits(seconds=5, memory_mib=256, processes=8, output_kib=64, tmp_mib=8)


def isolation_refused() -> str:
    try:
        require_isolation()
    except JailError as error:
        return str(error)
    return ""


REFUSED = isolation_refused()
jailed = pytest.mark.skipif(bool(REFUSED), reason=REFUSED or "isolated")


def program(source: str, stdin: bytes = b"", limits: Limits = QUICK) -> Ended:
    return run([python(), "-I", "-S", "-c", source], stdin=stdin, limits=limits)


def fails(source: str, error: str) -> None:
    ended = program(source)
    assert ended.code == 1, ended
    assert error in ended.stderr.decode(), ended.stderr.decode()


@jailed
def test_a_program_reads_writes_and_exits():
    ended = program("import sys; print(input()[::-1]); sys.exit(3)", b"abc\n")
    assert (ended.reason, ended.code, ended.stdout) == ("exited", 3, b"cba\n")
    big = b"x" * 3_000_000  # more than any pipe holds
    assert program("import sys; print(len(sys.stdin.read()))", big).stdout == b"3000000\n"
    assert program("import os; os.kill(os.getpid(), 9)").code == -9
    assert program("pass", big).succeeded  # what is not read is no error


@jailed
def test_files_of_the_host_are_not_there(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    fails(f"open({str(secret)!r})", "FileNotFoundError")
    fails(f"open({__file__!r})", "FileNotFoundError")
    for path in ("/etc/passwd", "/home", "/var", "/sys", "/run", "/proc/1/root/etc"):
        fails(f"import os; os.stat({path!r})", "Error")


@jailed
def test_nothing_but_tmp_can_be_written():
    for path in ("/new", "/usr/new", "/dev/new", "/proc/sys/kernel/hostname", python() + ".new"):
        fails(f"open({path!r}, 'w')", "Error")
    fails("import os; os.chmod('/usr/bin', 0o777)", "Error")
    assert program("open('/tmp/a', 'w').write('b'); print(open('a').read())").stdout == b"b\n"
    fails("open('/tmp/a')", "FileNotFoundError")  # private each time


@jailed
def test_symbolic_links_lead_nowhere(tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    fails(f"import os; os.symlink({str(tmp_path)!r}, '/tmp/a'); open('/tmp/a/secret')", "NotFound")
    fails("import os; os.symlink('/proc/1/root', '/tmp/a'); os.listdir('/tmp/a')", "Permission")
    fails("import os; os.link('/usr/bin/env', '/tmp/a')", "Error")


@jailed
def test_the_parents_of_the_root_are_the_root():
    found = program("import os; print(sorted(os.listdir('/' + '../' * 40)))")
    assert found.stdout == program("import os; print(sorted(os.listdir('/')))").stdout
    fails("import os; os.chroot('/tmp')", "PermissionError")


@jailed
def test_tmp_is_bounded():
    fails("f = open('/tmp/a', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()", "OSError")
    many = "for i in range(100):\n with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(1 << 19))"
    fails(many, "No space left")
    fails("for i in range(9999): open(f'/tmp/{i}', 'w').close()", "No space left")


@jailed
def test_there_is_no_network():
    for family in ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET"):
        fails(f"import socket; socket.socket(socket.{family})", "PermissionError")
    seen = program("print(open('/proc/net/dev').read())").stdout.decode().splitlines()
    assert [line.split(":")[0].strip() for line in seen if ":" in line] == ["lo"]
    assert program("import socket; socket.socketpair()").succeeded  # asyncio needs one


@jailed
def test_abstract_sockets_of_the_host_are_not_there():
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0tessera-jail-test")
        server.listen()
        code = "s = socket.socket(socket.AF_UNIX); s.connect('\\0tessera-jail-test')"
        fails(f"import socket; {code}", "ConnectionRefused")


@jailed
def test_a_fork_bomb_is_contained():
    begun = time.monotonic()
    ended = program("import os\nwhile True:\n try: os.fork()\n except OSError: pass")
    assert ended.reason != "exited"
    assert time.monotonic() - begun < QUICK.seconds + 5
    fails("import os\nfor _ in range(20): os.fork() or os.execv('/bin/sleep', ['s', '9'])", "Error")
    thread = "threading.Thread(target=time.sleep, args=[9], daemon=True).start()"
    fails(f"import threading, time\nfor _ in range(20): {thread}", "start new thread")


@jailed
def test_a_memory_bomb_is_contained():
    fails("a = bytearray(1 << 30)", "MemoryError")
    fails("a = []\nwhile True: a.append(bytearray(1 << 20))", "MemoryError")
    many = (
        "import os, time\n"
        "for _ in range(3): os.fork()\n"
        "a = bytearray(100 << 20)\n"  # within each one's bound, not within that of all together
        "time.sleep(9)"
    )
    assert program(many).reason == "memory"


@jailed
def test_memory_that_no_limit_counts_cannot_be_had():
    fails("import os; os.memfd_create('a')", "PermissionError")
    calls = {"shmget": 29, "msgget": 68, "io_uring_setup": 425, "userfaultfd": 323}
    for name, number in calls.items():
        code = "import ctypes; c = ctypes.CDLL(None, use_errno=True)"
        ended = program(f"{code}; print(c.syscall({number}, 0, 0, 0), ctypes.get_errno())")
        if os.uname().machine == "x86_64":
            assert ended.stdout == b"-1 1\n", name


@jailed
def test_nothing_can_be_traced_or_read_through_proc():
    code = "import ctypes; c = ctypes.CDLL(None, use_errno=True)"
    for call in ("c.ptrace(16, 1, 0, 0)", "c.ptrace(0, 0, 0, 0)", "c.unshare(0x10000000)"):
        assert program(f"{code}; print({call}, ctypes.get_errno())").stdout == b"-1 1\n", call
    for path in ("/proc/1/mem", "/proc/1/environ", "/proc/1/maps"):
        fails(f"open({path!r}, 'rb').read()", "PermissionError")
    for descriptor in range(16):
        fails(f"open('/proc/1/fd/{descriptor}', 'rb').read()", "Error")
    pids = program("import os; print([p for p in os.listdir('/proc') if p.isdigit()])")
    assert pids.stdout in (b"['1', '2']\n", b"['2', '1']\n")


@jailed
def test_the_watcher_cannot_be_killed_or_fooled():
    begun = time.monotonic()
    kill = "import os, signal\ntry: os.kill(1, signal.SIGKILL)\nexcept OSError: pass\nprint('on')"
    assert program(kill).stdout == b"on\n"
    stop = "import os, time\ntry: os.kill(1, 19)\nexcept OSError: pass\ntime.sleep(60)"
    limits = QUICK.model_copy(update={"seconds": 0.5})
    assert program(stop, limits=limits).reason == "time"
    assert time.monotonic() - begun < 5
    # The report's descriptor is not the program's: a forged one is noise on a closed number.
    forge = "import os\nfor fd in range(3, 1024):\n try: os.write(fd, b'{}')\n except OSError: pass"
    ended = program(f"{forge}\nraise SystemExit(5)")
    assert (ended.reason, ended.code) == ("exited", 5)


@jailed
def test_rights_cannot_be_gained():
    code = "import os; print(os.getuid() == 0, os.access('/usr', os.W_OK))"
    assert program(code).stdout == b"False False\n"
    fails("import os; os.setuid(0)", "Error")
    status = program("print(open('/proc/self/status').read())").stdout.decode()
    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(lines["CapEff"], 16) == int(lines["CapBnd"], 16) == 0
    assert (lines["NoNewPrivs"], lines["Seccomp"]) == ("1", "2")


@jailed
def test_huge_output_is_cut_and_ends_the_program():
    begun = time.monotonic()
    ended = program("while True: print('x' * 9999)")
    assert ended.reason == "output"
    assert len(ended.stdout) == QUICK.output_kib * 1024
    assert time.monotonic() - begun < 4
    assert program("import sys\nwhile True: sys.stderr.write('x' * 999)").reason == "output"


@jailed
def test_time_ends_a_program_that_waits_or_works():
    limits = QUICK.model_copy(update={"seconds": 0.5})
    for source in ("import time; time.sleep(60)", "while True: pass", "input()"):
        begun = time.monotonic()
        ended = program(source, limits=limits)
        assert ended.reason == "time" or source == "input()"
        assert time.monotonic() - begun < 4


@jailed
def test_a_sleeping_child_is_not_left_behind():
    mark = f"{time.time_ns() % 10**9 + 10**6}"
    source = (
        "import os, time\n"
        f"if os.fork() == 0:\n os.setsid()\n os.execv('/bin/sleep', ['sleep', '{mark}'])\n"
        "time.sleep(0.2); print('done')"
    )
    begun = time.monotonic()
    assert program(source).stdout == b"done\n"
    assert time.monotonic() - begun < 4  # nor is its open stdout waited for
    assert not running(mark)


@jailed
def test_a_killed_caller_takes_its_jail_along():
    mark = f"{time.time_ns() % 10**9 + 10**6}"
    source = (
        "from tessera.rl.jail.run import run, Limits\n"
        f"run(['/bin/sleep', '{mark}'], limits=Limits(seconds=60))"
    )
    caller = subprocess.Popen([sys.executable, "-c", source], cwd=Path(__file__).parents[2])
    try:
        wait_for(lambda: running(mark), 20)
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    wait_for(lambda: not running(mark), 5)


@jailed
def test_what_is_made_visible_can_be_read_and_not_written(tmp_path: Path):
    tmp_path.chmod(0o755)  # for root's programs, which run as nobody
    (tmp_path / "data").write_text("seen")
    source = f"p = {str(tmp_path / 'data')!r}; print(open(p).read()); open(p, 'w')"
    ended = run([python(), "-c", source], limits=QUICK, visible=[str(tmp_path)])
    assert ended.stdout == b"seen\n"
    assert b"Read-only" in ended.stderr


def test_without_isolation_it_refuses_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A kernel without namespaces, played by a jail that cannot enter them."""
    inside = tmp_path / "inside.py"
    source = jail.INSIDE.read_text()
    inside.write_text(
        source.replace("flags |= CLONE_NEWCGROUP", "raise OSError(1, 'not permitted')")
    )
    monkeypatch.setattr(jail, "INSIDE", inside)
    require_isolation.cache_clear()
    with pytest.raises(JailError, match="generated code is not run on this machine.*not permitted"):
        run([python(), "-c", "print(1)"])
    ended = run(
        [python(), "-c", "print(1)"], isolation="none, run generated code with my own rights"
    )
    assert ended.stdout == b"1\n"
    require_isolation.cache_clear()


@jailed
def test_a_hole_in_the_jail_is_found_by_its_self_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Each wall taken away in turn; the self-test names what stands open."""
    source = jail.INSIDE.read_text()
    holes = {
        'install_filter(bytes.fromhex(setup["filter"]))': "open a socket",
        'checked(libc.umount2(b".", MNT_DETACH), "umount of the old root")': "read a file",
        "prctl(PR_SET_NO_NEW_PRIVS, 1)": "gain rights",
    }
    for wall, words in holes.items():
        assert wall in source
        inside = tmp_path / "inside.py"
        inside.write_text(source.replace(wall, "pass"))
        monkeypatch.setattr(jail, "INSIDE", inside)
        require_isolation.cache_clear()
        with pytest.raises(JailError, match=f"a jailed program could .*{words}|not permitted"):
            require_isolation()
    require_isolation.cache_clear()


def test_limits_hold_without_isolation_too():
    limits = QUICK.model_copy(update={"seconds": 0.5})
    words = "none, run generated code with my own rights"
    argv = [python(), "-I", "-S", "-c"]
    assert run([*argv, "while True: pass"], limits=limits, isolation=words).reason == "time"
    ended = run([*argv, "a = bytearray(1 << 30)"], limits=QUICK, isolation=words)
    assert b"MemoryError" in ended.stderr


def running(mark: str) -> bool:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if entry.joinpath("cmdline").read_bytes().split(b"\0")[-2:-1] == [mark.encode()]:
                    return True
            except OSError:
                continue
    return False


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
