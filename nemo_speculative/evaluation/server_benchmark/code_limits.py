"""The inside of the sandbox: ``python -I -S jail.py SECONDS MEMORY_MB PASSED < program`` exits so or not.

A program of its own, which imports nothing of this project.  By the kernel: CPU seconds, address space, the size of
files, and, where user namespaces are permitted, a network namespace without any device.  By an audit hook, which no
Python code can take off: sockets, other processes, foreign functions (``ctypes``), and changes of files outside the
working directory.
"""

import os
import resource
import signal  # noqa: F401 - so that what is taken away stays away
import sys

FILE_MB, OPEN_FILES = 16, 64
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
REFUSED = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "pty.",
    "ctypes.", "signal.pthread_kill", "webbrowser.", "os.setxattr",
    "os.removexattr", "sys.remote_exec",
    "sqlite3.",  # whose SQL attaches any file
)  # fmt: skip
CHANGES = (
    "os.chmod", "os.chown", "os.chflags", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
    "os.truncate", "os.utime", "shutil.",
)  # fmt: skip
"""Of files; ``open`` is one where it writes."""
UNSEEN = {
    "os": ("mkfifo", "mknod"),
    "posix": ("mkfifo", "mknod"),
    "signal": ("pidfd_send_signal",),
    "_signal": ("pidfd_send_signal",),
}
"""Functions, by module, that no audit event tells of: they are taken away."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leave_network() -> bool:
    """Moves this process into a network namespace without devices; whether that is permitted here."""
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
        resource.RLIMIT_NPROC: 0,  # not another process or thread; root is exempt, for whom the hook remains
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def guard(directory: str) -> None:
    """Adds the audit hook: from now on only ``directory`` can be written to."""

    def outside(path) -> bool:
        if isinstance(path, int):  # a descriptor, and only files that were allowed are open
            return False
        name = os.path.realpath(os.fsdecode(path))
        return name != directory and not name.startswith(directory + os.sep) and name != os.devnull

    def hook(event: str, args: tuple) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is refused here")
        if event == "open":
            changes = bool(args[2] & WRITING) if args[1] is None else bool(set(args[1]) & set("wax+"))
            # A directory's descriptor would be a way past every path, as dir_fd=.
            paths = [args[0]] if changes or (args[1] is None and os.path.isdir(args[0])) else []
        else:
            named = [arg for arg in args if isinstance(arg, str | bytes | os.PathLike)]
            paths = named if event.startswith(CHANGES) else []
        if any(outside(path) for path in paths):
            raise PermissionError(f"{event}: {paths[0]!r} lies outside the sandbox")

    for module, names in UNSEEN.items():
        for name in names:
            if hasattr(sys.modules[module], name):
                delattr(sys.modules[module], name)
    sys.addaudithook(hook)


def main() -> None:
    """Reads the program, shuts the door, runs it."""
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
    leave = os._exit  # before the program can put something else there
    guard(directory)
    try:
        exec(compile(program, "program.py", "exec"), names)
    except BaseException:  # SystemExit as well
        leave(1)
    leave(int(passed))


if __name__ == "__main__":
    main()
