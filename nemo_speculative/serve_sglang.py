"""Serves a checkpoint with SGLang: ``python -m nemo_speculative.serve_sglang --draft CHECKPOINT``."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

from nemo_speculative.decoding.tau import acceptance_length
from nemo_speculative.serving.command import (
    ServeOptions,
    check_target,
    from_checkpoint,
    parsed_settings,
    serve_command,
    serve_environment,
    sglang_installed,
    shell_line,
)
from nemo_speculative.serving.engine import engine_answers
from nemo_speculative.serving.server import Server, ServerError, require_free
from nemo_speculative.serving.versions import NEWEST, OLDEST
from nemo_speculative.utils.errors import UsageError, UserError, print_error
from nemo_speculative.utils.sglang import installed_version

MAX_NEW_TOKENS = 256
OWN_ARGUMENTS = ("draft", "target_variant", "timeout", "log", "print_only", "dry_run", "prompts", "max_new_tokens")
"""Arguments that are no options of SGLang's command."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without argparse's usage in front."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of everything before ``--``."""
    parser = _Parser(prog="python -m nemo_speculative.serve_sglang", description=__doc__, allow_abbrev=False,
                     epilog="Everything after -- is passed to sglang.launch_server unchanged.")  # fmt: skip
    parser.add_argument("--draft", required=True, help="a run directory, a step_<N> directory or its model/")

    recorded = parser.add_argument_group("instead of what the checkpoint records")
    recorded.add_argument("--target", help="directory or hub name of the target model")
    recorded.add_argument("--target-variant", action="store_true", help="accept other weights of the same shape")
    recorded.add_argument("--algorithm", help="SGLang's name of the algorithm")
    recorded.add_argument("--num-steps", type=int, help="draft tokens along one branch")
    recorded.add_argument("--topk", type=int, help="branches at each step; 1 is a chain")
    recorded.add_argument("--num-draft-tokens", type=int, help="tokens verified at once (steps * top-k + 1)")
    recorded.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of target and draft")

    server = parser.add_argument_group("the server")
    server.add_argument("--sglang-version", help=f"{OLDEST} to {NEWEST} (default: the installed one, else {NEWEST})")
    server.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to test a draft, greedily")
    server.add_argument("--tp-size", type=int, default=1, help="GPUs that share the target (default: %(default)s)")
    server.add_argument("--cuda-graph-max-bs", type=int, help="the largest batch decoded by a CUDA graph")
    server.add_argument("--rejection-sampling", action="store_true", help="sample drafts; for chains, whole vocabulary")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument("--port", type=int, default=30000, help="(default: %(default)s)")
    server.add_argument("--trust-remote-code", action="store_true", help="let the target's own code run")
    server.add_argument("--timeout", type=float, default=900.0, help="seconds to wait until it is ready (default: 900)")
    server.add_argument("--log", type=Path, help="the file that receives SGLang's output (default: a temporary one)")

    actions = parser.add_argument_group("instead of serving")
    action = actions.add_mutually_exclusive_group()
    action.add_argument("--print-only", action="store_true", help="print the command and start nothing")
    action.add_argument("--dry-run", action="store_true", help="let SGLang's parser read the command, start nothing")
    action.add_argument(
        "--prompt", dest="prompts", action="append", metavar="TEXT", help="answer it and exit; repeatable"
    )
    actions.add_argument("--max-new-tokens", type=int, help=f"of the answer to --prompt (default: {MAX_NEW_TOKENS})")
    return parser


def run(argv: Sequence[str]) -> None:
    """Carries out a command line; raises ServerError if SGLang fails, another UserError if the line is refused."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:end])
    if args.max_new_tokens is not None and (args.max_new_tokens < 1 or not args.prompts):
        raise UsageError(f"--max-new-tokens is {args.max_new_tokens}: expected at least 1, together with --prompt")
    overrides = {key: value for key, value in vars(args).items() if key not in OWN_ARGUMENTS}
    options = from_checkpoint(args.draft, {**overrides, "extra": tuple(words[end + 1 :])})
    check_target(options, args.target_variant)
    if args.print_only:
        print(shell_line(options))
    elif args.dry_run:
        dry_run(options)
    elif args.prompts:
        answer_prompts(options, args)
    else:
        serve(options, args)


def dry_run(options: ServeOptions) -> None:
    """Prints the settings that SGLang's own parser reads from the command."""
    _require_sglang(options)
    settings = parsed_settings(options)
    print(f"SGLang {options.sglang_version} understands:")
    for name, value in settings.items():
        print(f"  {name:30}{value}")


def answer_prompts(options: ServeOptions, args: argparse.Namespace) -> None:
    """Answers the prompts with SGLang's engine."""
    log = _prepare_start(options, args.log)
    limit = args.max_new_tokens or MAX_NEW_TOKENS
    with closing(engine_answers(options, args.prompts, limit, args.timeout, log)) as answers:
        for prompt, (text, tokens, verifications) in zip(args.prompts, answers, strict=True):
            tau = acceptance_length(tokens, verifications)  # SGLang's, which counts the prefill's token
            length = f", acceptance length {tau:.2f}" if tau else ""
            print(f"\n> {prompt}\n{text}\n[{tokens} tokens in {verifications} verifications{length}]", flush=True)


def serve(options: ServeOptions, args: argparse.Namespace) -> None:
    """Starts the server, tests it with one request, prints its address, and waits until it ends or a signal comes."""
    require_free(options.host, options.port)
    log = _prepare_start(options, args.log)
    command, environment = serve_command(options, sys.executable), serve_environment(options)
    with Server(command, environment, options.host, options.port, log) as server:
        server.wait_until_healthy(args.timeout)
        tokens, verifications = server.smoke_test(args.timeout, options.api_key)
        print(
            f"serving {options.draft} on {server.url} (tried with {tokens} tokens in {verifications} verifications); "
            "Ctrl-C ends it",
            flush=True,
        )
        server.wait()


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


def _prepare_start(options: ServeOptions, log: Path | None) -> Path:
    """Refuses early what would otherwise fail only after SGLang's long start; returns the log file."""
    _require_sglang(options)
    target = Path(options.target)
    looks_local = target.is_absolute() or options.target.startswith((".", "~")) or options.target.count("/") != 1
    if looks_local and not target.is_dir():
        raise UsageError(f"the target {options.target} does not exist; say where it is: --target DIRECTORY")
    if options.device != "cpu":
        import torch

        if not torch.accelerator.is_available():
            raise UsageError("--device cuda: no accelerator is found; add --device cpu, which can test a draft")
    try:
        if log is None:
            with tempfile.NamedTemporaryFile(prefix="sglang-", suffix=".log", delete=False) as file:
                log = Path(file.name)
        log.open("ab").close()
    except OSError as error:
        raise UsageError(f"--log {log}: cannot be written ({error.strerror}); name another file") from None
    if not log.is_file():
        raise UsageError(f"--log {log}: not a regular file, so its last lines could not be read; name another")
    print(f"starting SGLang; its log is {log}", flush=True)
    return log


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; a second one would interrupt the cleanup, and is ignored."""

    def interrupt(*_: object) -> NoReturn:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code: 2 for a refused command line, 1 for a server that failed."""
    try:
        with _interrupted_once():
            run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print_error(error)
        return error.exit_code if isinstance(error, ServerError) else UsageError.exit_code
    except KeyboardInterrupt:
        print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
