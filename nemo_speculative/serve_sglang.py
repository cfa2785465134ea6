"""Serves a checkpoint with SGLang: ``python -m nemo_speculative.serve_sglang --draft CHECKPOINT``."""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from nemo_speculative.serving.command import (
    ServeOptions,
    from_checkpoint,
    parsed_settings,
    serve_command,
    serve_environment,
    sglang_installed,
    shell_line,
)
from nemo_speculative.serving.engine import engine_answers
from nemo_speculative.serving.server import Server, ServerError, require_free
from nemo_speculative.serving.target_check import check_target
from nemo_speculative.serving.versions import NEWEST, OLDEST
from nemo_speculative.utils.errors import UsageError, UserError, print_error
from nemo_speculative.utils.sglang import installed_version

MAX_NEW_TOKENS = 256
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without argparse's usage in front."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


class _Stopped(BaseException):
    """Raised by Ctrl-C and SIGTERM."""


@dataclass(frozen=True)
class Job:
    """A parsed command line."""

    options: ServeOptions
    action: Callable[["Job"], None]
    """:func:`print_command`, :func:`dry_run`, :func:`answer_prompts` or :func:`serve`."""
    target_variant: bool
    timeout: float
    """Seconds to wait until SGLang is ready, and then for the first answer."""
    log: Path | None
    """The log file; None: a temporary file."""
    prompts: tuple[str, ...]
    max_new_tokens: int


def build_parser() -> argparse.ArgumentParser:
    """The parser of everything before ``--``."""
    parser = _Parser(prog="python -m nemo_speculative.serve_sglang", description=__doc__, allow_abbrev=False,
                     epilog="Everything after -- is passed to sglang.launch_server unchanged.")  # fmt: skip
    parser.add_argument("--draft", required=True, help="a run directory, a step_<N> directory or its model/")

    recorded = parser.add_argument_group("instead of what the checkpoint records")
    recorded.add_argument("--target", help="directory or hub name of the target model")
    recorded.add_argument("--target-variant", action="store_true",
                          help="accept other weights of the same shape, such as a quantized copy")  # fmt: skip
    recorded.add_argument("--algorithm", help="SGLang's name of the algorithm")
    recorded.add_argument("--num-steps", type=int, help="draft tokens along one branch")
    recorded.add_argument("--topk", type=int, help="branches at each step; 1 is a chain")
    recorded.add_argument("--num-draft-tokens", type=int,
                          help="tokens verified at once, last sampled one included (steps * top-k + 1)")  # fmt: skip
    recorded.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of target and draft")

    server = parser.add_argument_group("the server")
    server.add_argument("--sglang-version", help=f"{OLDEST} to {NEWEST} (default: the installed one, else {NEWEST})")
    server.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                        help="cpu: temperature 0, for testing a checkpoint (default: %(default)s)")  # fmt: skip
    server.add_argument("--tp-size", type=int, default=1, help="GPUs that share the target (default: %(default)s)")
    server.add_argument("--cuda-graph-max-bs", type=int, help="the largest batch decoded by a CUDA graph")
    server.add_argument("--rejection-sampling", action="store_true",
                        help="sample drafts, accept by probability; for chains over the whole vocabulary")  # fmt: skip
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument("--port", type=int, default=30000, help="(default: %(default)s)")
    server.add_argument("--trust-remote-code", action="store_true", help="let the target's own code run")
    server.add_argument("--timeout", type=float, default=900.0, help="seconds to wait until it is ready (default: 900)")
    server.add_argument("--log", type=Path, help="the file that receives SGLang's output (default: a temporary one)")

    actions = parser.add_argument_group("instead of serving")
    action = actions.add_mutually_exclusive_group()
    action.add_argument("--print-only", dest="action", action="store_const", const=print_command,
                        help="print the command and start nothing")  # fmt: skip
    action.add_argument("--dry-run", dest="action", action="store_const", const=dry_run,
                        help="let SGLang's own parser read the command, and start nothing")  # fmt: skip
    action.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT",
                        help="answer this and exit, with SGLang's engine and no server; repeatable")  # fmt: skip
    actions.add_argument("--max-new-tokens", type=int, help=f"of the answer to --prompt (default: {MAX_NEW_TOKENS})")
    return parser


def parse(argv: Sequence[str]) -> Job:
    """The job of a command line.

    Raises:
        UserError: the command line cannot be carried out.
    """
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    values = vars(build_parser().parse_args(words[:end]))
    prompts, limit = tuple(values.pop("prompts") or ()), values.pop("max_new_tokens")
    if limit is not None and (limit < 1 or not prompts):
        raise UsageError(f"--max-new-tokens is {limit}: expected at least 1, together with --prompt")
    path, action = values.pop("draft"), values.pop("action") or (answer_prompts if prompts else serve)
    own = {key: values.pop(key) for key in ("target_variant", "timeout", "log")}
    options = from_checkpoint(path, {**values, "extra": tuple(words[end + 1 :])})
    return Job(options, action, **own, prompts=prompts, max_new_tokens=limit or MAX_NEW_TOKENS)


def print_command(job: Job) -> None:
    """Prints the command as one line to paste into a shell."""
    print(shell_line(job.options))


def dry_run(job: Job) -> None:
    """Prints the settings that SGLang's own parser reads from the command.

    Raises:
        UsageError: SGLang is not installed, or does not understand the command.
    """
    _require_sglang(job.options)
    settings = parsed_settings(job.options)
    print(f"SGLang {job.options.sglang_version} understands:")
    for name, value in settings.items():
        print(f"  {name:30}{value}")


def answer_prompts(job: Job) -> None:
    """Answers the prompts with SGLang's engine.

    Raises:
        UserError: SGLang cannot run here, or the chat template rejects a prompt.
        ServerError: the engine did not start, or died.
    """
    _check_runnable(job.options)
    log = _log_file(job)
    print(f"starting SGLang; its log is {log}", flush=True)
    with closing(engine_answers(job.options, job.prompts, job.max_new_tokens, job.timeout, log)) as answers:
        for prompt, answer in zip(job.prompts, answers, strict=True):
            print(f"\n> {prompt}\n{answer.text}\n[{answer.statistics}]", flush=True)


def serve(job: Job) -> None:
    """Starts the server, tests it with one request, prints its address, and waits until it ends or a signal comes.

    Raises:
        UsageError: SGLang cannot run here, or its port is busy.
        ServerError: it did not start, does not speculate, or ended by itself.
    """
    options = job.options
    require_free(options.host, options.port)
    _check_runnable(options)
    log = _log_file(job)
    command, environment = serve_command(options, sys.executable), serve_environment(options)
    print(f"starting SGLang; its log is {log}", flush=True)
    with Server(command, environment, options.host, options.port, log) as server:
        try:
            server.wait_until_healthy(job.timeout)
            first = server.smoke_test(job.timeout, options.api_key)
            print(
                f"serving {options.draft} on {server.url} (tried with {first.tokens} tokens in {first.verifications} "
                "verifications); Ctrl-C ends it",
                flush=True,
            )
            server.wait()
        finally:
            _ignore_signals()


def _require_sglang(options: ServeOptions) -> None:
    if not sglang_installed():
        raise UsageError(
            f"SGLang is not installed in the environment of {sys.executable}: install it into an environment of its "
            "own as requirements-sglang.txt says and start this with that environment's python, or add --print-only"
        )
    installed = installed_version() or options.sglang_version
    if installed != options.sglang_version:
        raise UsageError(
            f"--sglang-version is {options.sglang_version}, and {installed} is installed here: leave it out, or add "
            "--print-only"
        )


def _check_runnable(options: ServeOptions) -> None:
    """Refuses early what would otherwise fail only after SGLang's long start.

    Raises:
        UsageError: SGLang, the target directory or an accelerator is missing.
    """
    _require_sglang(options)
    target = Path(options.target)
    looks_local = target.is_absolute() or options.target.startswith((".", "~")) or options.target.count("/") != 1
    if looks_local and not target.is_dir():
        raise UsageError(f"the target {options.target} does not exist; say where it is: --target DIRECTORY")
    if options.device != "cpu":
        import torch

        if not torch.accelerator.is_available():
            raise UsageError("--device cuda: no accelerator is found; add --device cpu, which can test a draft")


def _log_file(job: Job) -> Path:
    if job.log is None:
        descriptor, name = tempfile.mkstemp(prefix="sglang-", suffix=".log")
        os.close(descriptor)
        return Path(name)
    try:
        job.log.open("ab").close()
    except OSError as error:
        raise UsageError(f"--log {job.log}: cannot be written ({error.strerror}); name another file") from None
    if not job.log.is_file():
        raise UsageError(f"--log {job.log}: not a regular file, so its last lines could not be read; name another")
    return job.log


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise :class:`_Stopped` inside."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        _ignore_signals()
        raise _Stopped

    handlers = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    """Keeps a second Ctrl-C from interrupting the shutdown, which would leave processes running."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code: 2 for a refused command line, 1 for a server that failed."""
    try:
        job = parse(sys.argv[1:] if argv is None else argv)
        check_target(job.options, job.target_variant)
        with _stopped_by_signals():
            job.action(job)
    except ServerError as error:
        print(error.log_tail, file=sys.stderr)
        print_error(error)
        return error.exit_code
    except UserError as error:
        print_error(error)
        return UsageError.exit_code
    except _Stopped:
        print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
