"""Serves a checkpoint with SGLang: ``python -m nemo_speculative.serve_sglang --draft CHECKPOINT``."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from nemo_speculative.errors import UsageError, UserError, report
from nemo_speculative.serving.command import (
    ServeOptions,
    from_checkpoint,
    serve_command,
    serve_environment,
    sglang_installed,
    shell_line,
)
from nemo_speculative.serving.server import Server, ServerError, require_free


class _Parser(argparse.ArgumentParser):
    """argparse would print its usage in front of the error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM."""


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m nemo_speculative.serve_sglang", description=__doc__, allow_abbrev=False,
                     epilog="Everything behind -- goes to sglang.launch_server as it is.")  # fmt: skip
    parser.add_argument("--draft", required=True, help="a run directory, a step_<N> directory or its model/")
    remembered = parser.add_argument_group("instead of what the checkpoint remembers")
    remembered.add_argument("--target", help="directory or hub name of the target model")
    remembered.add_argument("--algorithm", help="SGLang's name of the algorithm")
    remembered.add_argument("--num-steps", type=int, help="draft tokens along one branch")
    remembered.add_argument("--topk", type=int, help="branches at each step; 1 is a chain")
    remembered.add_argument("--num-draft-tokens", type=int,
                            help="tokens verified at once, one of them known before (steps * top-k + 1)")  # fmt: skip
    remembered.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of target and draft")
    server = parser.add_argument_group("the server")
    server.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: temperature 0, for judging a checkpoint (default: %(default)s)")  # fmt: skip
    server.add_argument("--tp-size", type=int, default=1, help="GPUs that share the target (default: %(default)s)")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument("--port", type=int, default=30000, help="(default: %(default)s)")
    server.add_argument("--trust-remote-code", action="store_true", help="let the target's own code run")
    server.add_argument("--timeout", type=float, default=900.0, help="seconds to wait until it is ready (default: 900)")
    server.add_argument("--print-only", action="store_true", help="print the command and start nothing")
    return parser


def parse(argv: Sequence[str]) -> tuple[ServeOptions, float, bool]:
    """What to serve, how long to wait for it, and whether to print the command only.

    Raises:
        UserError: the command line cannot be carried out.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    values = vars(build_parser().parse_args(words[:cut]))
    path, timeout, print_only = values.pop("draft"), values.pop("timeout"), values.pop("print_only")
    return from_checkpoint(path, {**values, "extra": tuple(words[cut + 1 :])}), timeout, print_only


def check_startable(options: ServeOptions) -> None:
    """Refuses what would only fail after SGLang's long start.

    Raises:
        UsageError: SGLang, the target directory or a free port is missing.
    """
    if not sglang_installed():
        raise UsageError(
            f"SGLang is not installed beside {sys.executable}: install it into an environment of its own as "
            "requirements-sglang.txt says and start this with that environment's python, or add --print-only"
        )
    target = Path(options.target)
    looks_local = target.is_absolute() or options.target.startswith((".", "~")) or options.target.count("/") != 1
    if looks_local and not target.is_dir():
        raise UsageError(f"the target {options.target} does not exist; say where it is: --target DIRECTORY")
    require_free(options.host, options.port)
    if options.device != "cpu" and not torch.accelerator.is_available():
        raise UsageError("--device cuda: no accelerator is found here; add --device cpu, which serves to judge a draft")


def serve(options: ServeOptions, timeout: float) -> None:
    """Starts the server, says where it listens, and stays until it ends or a signal comes.

    Raises:
        ServerError: it did not come up, or went down by itself.
    """
    log = Path(tempfile.mkstemp(prefix="sglang-", suffix=".log")[1])
    command, environment = serve_command(options, sys.executable), serve_environment(options)
    print(f"starting SGLang; its log is {log}", flush=True)
    with Server(command, environment, options.host, options.port, log) as server:
        try:
            server.wait_until_healthy(timeout)
            print(f"serving {options.draft} on {server.url}; Ctrl-C ends it", flush=True)
            server.wait()
        finally:
            # A second Ctrl-C must not leave half of the processes behind.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise :class:`_Stopped` inside."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise _Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code: 2 for a refused command line, 1 for a server that failed."""
    try:
        options, timeout, print_only = parse(sys.argv[1:] if argv is None else argv)
        if print_only:
            print(shell_line(options))
            return 0
        check_startable(options)
    except UserError as error:
        return _fail(error, UsageError.exit_code)
    try:
        with _stopped_by_signals():
            serve(options, timeout)
    except ServerError as error:
        print(error.log_tail, file=sys.stderr)
        return _fail(error, error.exit_code)
    except _Stopped:
        print("stopped", flush=True)
    return 0


def _fail(error: UserError, code: int) -> int:
    report(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
