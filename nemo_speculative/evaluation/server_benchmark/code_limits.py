"""Runs a program under limits: ``python -I -S code_limits.py SECONDS MEMORY_MB EXIT_CODE < program``.

It exits with EXIT_CODE if the program reached its end without an exception.  A script that imports nothing of this
project.  The kernel limits CPU seconds, address space and the size of files, and, where user namespaces are permitted,
gives a network namespace without devices.  An audit hook, which Python code cannot remove, refuses sockets, other
processes, foreign functions (``ctypes``), and changes to files outside the working directory.
"""

import os
import resource
import signal  # noqa: F401 - imported now, so that its removed functions are not loaded again
import sys

FILE_MB, OPEN_FILES = 16, 64
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
REFUSED = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty.",
    "ctypes.", "signal.pthread_kill", "webbrowser.", "os.setxattr", "os.removexattr", "sys.remote_exec",
    "sqlite3.",  # whose SQL attaches any file
)  # fmt: skip
CHANGES = (
    "os.chmod", "os.chown", "os.chflags", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
    "os.truncate", "os.utime", "shutil.",
)  # fmt: skip
"""Events that change files, in addition to ``open`` for writing."""
UNAUDITED = (("os", "posix", "mkfifo"), ("os", "posix", "mknod"), ("signal", "_signal", "pidfd_send_signal"))
"""Functions, each after its modules, that raise no audit event; they are removed."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leave_network() -> bool:
    """Moves this process into a network namespace without devices; False: that is not permitted here."""
    import ctypes

    return ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0


def limit(seconds: float, memory_mb: int) -> None:
    """Sets the kernel's limits on this process."""
    whole, memory = int(seconds) + 1, memory_mb << 20
    limits = {
        resource.RLIMIT_CPU: whole,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: FILE_MB << 20,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,  # no other process or thread; root is exempt, but the hook still applies
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def guard(directory: str) -> None:
    """Adds the audit hook, which allows writing only below ``directory``."""

    def outside(path) -> bool:
        if isinstance(path, int):  # a descriptor: only permitted files are open
            return False
        name = os.path.realpath(os.fsdecode(path))
        return name != directory and not name.startswith(directory + os.sep) and name != os.devnull

    def hook(event: str, args: tuple) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is refused here")
        if event == "open":
            changes = bool(args[2] & WRITING) if args[1] is None else bool(set(args[1]) & set("wax+"))
            # A directory's descriptor, as dir_fd=, would bypass the check of paths.
            paths = [args[0]] if changes or (args[1] is None and os.path.isdir(args[0])) else []
        else:
            named = [arg for arg in args if isinstance(arg, str | bytes | os.PathLike)]
            paths = named if event.startswith(CHANGES) else []
        if any(outside(path) for path in paths):
            raise PermissionError(f"{event}: {paths[0]!r} is outside the sandbox")

    for *modules, name in UNAUDITED:
        for module in modules:
            vars(sys.modules[module]).pop(name, None)
    sys.addaudithook(hook)


def main() -> None:
    """Reads the program, applies the limits, and runs it."""
    permitted = leave_network()
    if sys.argv[1] == "--guard":
        print("a network namespace of its own" if permitted else "an audit hook (no user namespaces here)")
        return
    program = sys.stdin.buffer.read()
    seconds, memory_mb, passed = sys.argv[1:]
    del sys.argv[1:]
    limit(float(seconds), int(memory_mb))
    directory = os.path.realpath(os.getcwd())
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    leave = os._exit  # before the program can replace it
    guard(directory)
    try:
        exec(compile(program, "program.py", "exec"), names)
    except BaseException:  # SystemExit as well
        leave(1)
    leave(int(passed))


if __name__ == "__main__":
    main()
