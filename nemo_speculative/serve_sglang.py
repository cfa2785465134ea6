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

import torch

from nemo_speculative.serving.command import (
    ServeOptions,
    from_checkpoint,
    serve_command,
    serve_environment,
    sglang_installed,
    shell_line,
)
from nemo_speculative.serving.dry_run import understood
from nemo_speculative.serving.engine import answers
from nemo_speculative.serving.match import check_target
from nemo_speculative.serving.process import ServerError
from nemo_speculative.serving.server import Server, require_free
from nemo_speculative.serving.versions import NEWEST, OLDEST, installed_version
from nemo_speculative.utils.errors import UsageError, UserError, print_error

MAX_NEW_TOKENS = 256
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Parser(argparse.ArgumentParser):
    """argparse would print its usage in front of the error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM."""


@dataclass(frozen=True)
class Job:
    """A command line."""

    options: ServeOptions
    act: Callable[["Job"], None]
    """What to do with them: :func:`print_command`, :func:`dry_run`, :func:`ask` or :func:`serve`."""
    target_variant: bool
    timeout: float
    """Seconds to wait until SGLang is ready, and then for the first answer."""
    log: Path | None
    """None: a temporary file."""
    prompts: tuple[str, ...]
    max_new_tokens: int


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m nemo_speculative.serve_sglang", description=__doc__, allow_abbrev=False,
                     epilog="Everything behind -- goes to sglang.launch_server as it is.")  # fmt: skip
    parser.add_argument("--draft", required=True, help="a run directory, a step_<N> directory or its model/")
    _add_remembered(parser.add_argument_group("instead of what the checkpoint remembers"))
    _add_server(parser.add_argument_group("the server"))
    _add_acts(parser.add_argument_group("instead of serving"))
    return parser


def _add_remembered(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--target", help="directory or hub name of the target model")
    group.add_argument("--target-variant", action="store_true",
                       help="accept other weights of the same shape, such as a quantised copy")  # fmt: skip
    group.add_argument("--algorithm", help="SGLang's name of the algorithm")
    group.add_argument("--num-steps", type=int, help="draft tokens along one branch")
    group.add_argument("--topk", type=int, help="branches at each step; 1 is a chain")
    group.add_argument("--num-draft-tokens", type=int,
                       help="tokens verified at once, one of them known before (steps * top-k + 1)")  # fmt: skip
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of target and draft")


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sglang-version", help=f"{OLDEST} to {NEWEST} (default: the installed one, else {NEWEST})")
    group.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                       help="cpu: temperature 0, for judging a checkpoint (default: %(default)s)")  # fmt: skip
    group.add_argument("--tp-size", type=int, default=1, help="GPUs that share the target (default: %(default)s)")
    group.add_argument("--cuda-graph-max-bs", type=int, help="the largest batch decoded by a CUDA graph")
    group.add_argument("--rejection-sampling", action="store_true",
                       help="sample drafts, accept by probability; for chains over the whole vocabulary")  # fmt: skip
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=int, default=30000, help="(default: %(default)s)")
    group.add_argument("--trust-remote-code", action="store_true", help="let the target's own code run")
    group.add_argument("--timeout", type=float, default=900.0, help="seconds to wait until it is ready (default: 900)")
    group.add_argument("--log", type=Path, help="the file that takes SGLang's output (default: a temporary one)")


def _add_acts(group: argparse._ArgumentGroup) -> None:
    one = group.add_mutually_exclusive_group()
    one.add_argument("--print-only", dest="act", action="store_const", const=print_command,
                     help="print the command and start nothing")  # fmt: skip
    one.add_argument("--dry-run", dest="act", action="store_const", const=dry_run,
                     help="let SGLang's own parser read the command, and start nothing")  # fmt: skip
    one.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT",
                     help="answer this and end, with SGLang's engine and no server; repeatable")  # fmt: skip
    group.add_argument("--max-new-tokens", type=int, help=f"of the answer to --prompt (default: {MAX_NEW_TOKENS})")


def parse(argv: Sequence[str]) -> Job:
    """What to do with which options.

    Raises:
        UserError: the command line cannot be carried out.
    """
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    values = vars(build_parser().parse_args(words[:cut]))
    prompts, limit = tuple(values.pop("prompts") or ()), values.pop("max_new_tokens")
    if limit is not None and (limit < 1 or not prompts):
        raise UsageError(f"--max-new-tokens is {limit}: expected at least 1, beside --prompt")
    path, act = values.pop("draft"), values.pop("act") or (ask if prompts else serve)
    own = {key: values.pop(key) for key in ("target_variant", "timeout", "log")}
    options = from_checkpoint(path, {**values, "extra": tuple(words[cut + 1 :])})
    return Job(options, act, **own, prompts=prompts, max_new_tokens=limit or MAX_NEW_TOKENS)


def print_command(job: Job) -> None:
    """One line to paste into a shell."""
    print(shell_line(job.options))


def dry_run(job: Job) -> None:
    """What SGLang's own parser understands.

    Raises:
        UsageError: SGLang is not installed, or does not understand the command.
    """
    _require_sglang(job.options)
    settings = understood(job.options)
    print(f"SGLang {job.options.sglang_version} understands:")
    for name, value in settings.items():
        print(f"  {name:30}{value}")


def ask(job: Job) -> None:
    """Answers the prompts with SGLang's engine.

    Raises:
        UserError: SGLang cannot run here, or the chat template rejects a prompt.
        ServerError: the engine did not come up, or went down.
    """
    _check_runnable(job.options)
    log = _log_file(job)
    print(f"starting SGLang; its log is {log}", flush=True)
    with closing(answers(job.options, job.prompts, job.max_new_tokens, job.timeout, log)) as asked:
        for prompt, answer in zip(job.prompts, asked, strict=True):
            print(f"\n> {prompt}\n{answer.text}\n[{answer.cost}]", flush=True)


def serve(job: Job) -> None:
    """Starts the server, tries it, says where it listens, and stays until it ends or a signal comes.

    Raises:
        UsageError: SGLang cannot run here, or its port is busy.
        ServerError: it did not come up, does not speculate, or went down by itself.
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
            first = server.smoke(job.timeout, options.api_key)
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
            f"SGLang is not installed beside {sys.executable}: install it into an environment of its own as "
            "requirements-sglang.txt says and start this with that environment's python, or add --print-only"
        )
    found = installed_version() or options.sglang_version
    if found != options.sglang_version:
        raise UsageError(
            f"--sglang-version is {options.sglang_version}, and {found} is installed here: leave it out, or add "
            "--print-only"
        )


def _check_runnable(options: ServeOptions) -> None:
    """Refuses what would only fail after SGLang's long start.

    Raises:
        UsageError: SGLang, the target directory or an accelerator is missing.
    """
    _require_sglang(options)
    target = Path(options.target)
    looks_local = target.is_absolute() or options.target.startswith((".", "~")) or options.target.count("/") != 1
    if looks_local and not target.is_dir():
        raise UsageError(f"the target {options.target} does not exist; say where it is: --target DIRECTORY")
    if options.device != "cpu" and not torch.accelerator.is_available():
        raise UsageError("--device cuda: no accelerator is found here; add --device cpu, which serves to judge a draft")


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
        raise UsageError(f"--log {job.log}: not a regular file, which its last lines could be read from; name another")
    return job.log


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise :class:`_Stopped` inside."""
    before = {number: signal.signal(number, _stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    _ignore_signals()
    raise _Stopped


def _ignore_signals() -> None:
    """A second Ctrl-C must not leave half of the processes behind."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code: 2 for a refused command line, 1 for a server that failed."""
    try:
        job = parse(sys.argv[1:] if argv is None else argv)
        check_target(job.options, job.target_variant)
        with _stopped_by_signals():
            job.act(job)
    except ServerError as error:
        print(error.log_tail, file=sys.stderr)
        return _fail(error, error.exit_code)
    except UserError as error:
        return _fail(error, UsageError.exit_code)
    except _Stopped:
        print("stopped", flush=True)
    return 0


def _fail(error: UserError, code: int) -> int:
    print_error(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
