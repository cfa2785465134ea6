"""Single prompts through SGLang's engine, without a server.

``sgl.Engine`` kills the process that made it when one of its own fails.  So it lives in a process of ours, which is
this module run as a program:

    python -m nemo_speculative.serving.engine DESCRIPTOR FLAG …       (the flags of sglang.launch_server)

It reads ``{"prompts", "max_new_tokens"}`` from its standard input and writes to the open file DESCRIPTOR an object a
line: ``{}`` when it is ready, then ``{"text", "tokens", "verifications"}`` for each prompt, or ``{"error"}``.
"""

import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nemo_speculative.data.chat_template import prompt_ids
from nemo_speculative.serving.command import ServeOptions, serve_environment, serve_flags
from nemo_speculative.serving.process import STOP_SECONDS, SGLangProcess
from nemo_speculative.utils.errors import UserError

PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Answer:
    """What SGLang answered, and what it took."""

    text: str
    tokens: int
    verifications: int
    """Zero where the prefill alone finished the answer."""

    @property
    def cost(self) -> str:
        """In words; the acceptance length is tokens per verification as SGLang counts them, with the prefill's."""
        length = f", acceptance length {self.tokens / self.verifications:.2f}" if self.verifications else ""
        return f"{self.tokens} tokens in {self.verifications} verifications{length}"


def answers(
    options: ServeOptions, prompts: Sequence[str], max_new_tokens: int, timeout: float, log: Path
) -> Generator[Answer]:
    """The greedy answers to ``prompts``, one after the other.

    Args:
        timeout: seconds to wait until the engine is ready, and then for every answer.
        log: the file that takes all that SGLang prints.

    Raises:
        ServerError: the engine did not come up, went down, or does not answer.
        UserError: the chat template rejects a prompt.
    """
    with _asked({"prompts": prompts, "max_new_tokens": max_new_tokens}) as request, _pipe() as (lines, descriptor):
        command = [sys.executable, "-m", __name__, str(descriptor), *serve_flags(options)]
        environment = serve_environment(options)
        with SGLangProcess(command, environment, log, stdin=request, pass_fds=(descriptor,)) as process:
            os.close(descriptor)  # so that the other end's is the only one, and its death ends the file
            _next(lines, process, timeout, "ready")
            for _ in prompts:
                yield Answer(**_next(lines, process, timeout, "done with its answer"))
            with suppress(TimeoutError):
                lines.next(STOP_SECONDS)  # until the engine has ended its own processes


@contextmanager
def _asked(request: dict[str, Any]) -> Iterator[IO[str]]:
    """A file that holds ``request``."""
    with tempfile.TemporaryFile("w+") as file:
        json.dump(request, file)
        file.flush()
        file.seek(0)
        yield file


@contextmanager
def _pipe() -> Iterator[tuple["_Lines", int]]:
    """What is read, and the descriptor to write to, which is to be closed inside."""
    reading, writing = os.pipe()
    try:
        yield _Lines(reading), writing
    finally:
        os.close(reading)


class _Lines:
    """Lines of a pipe, waited for no longer than they may take."""

    def __init__(self, descriptor: int):
        self._descriptor, self._rest = descriptor, b""

    def next(self, timeout: float) -> bytes:
        """The next whole line; empty: there is none any more.

        Raises:
            TimeoutError: it did not come within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            if not select.select([self._descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError
            if not (read := os.read(self._descriptor, PIECE_BYTES)):
                return b""  # what was cut off by the writer's death is no line
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def _next(lines: _Lines, process: SGLangProcess, timeout: float, state: str) -> dict[str, Any]:
    try:
        line = lines.next(timeout)
    except TimeoutError:
        raise process.failed(f"SGLang was not {state} after {timeout:g} s") from None
    if not line:
        raise process.ended(f"before it was {state}")
    found = json.loads(line)
    if "error" in found:
        raise UserError(found["error"])
    return found


def main(descriptor: str, *flags: str) -> None:
    """The program."""
    os.set_inheritable(int(descriptor), False)
    request = json.load(sys.stdin)
    with os.fdopen(int(descriptor), "w", buffering=1) as out:
        for line in _serve(list(flags), request["prompts"], request["max_new_tokens"]):
            out.write(json.dumps(line) + "\n")


def _serve(flags: list[str], prompts: list[str], max_new_tokens: int) -> Iterator[dict[str, Any]]:
    import sglang
    from sglang.srt.server_args import prepare_server_args

    engine = sglang.Engine(server_args=prepare_server_args(flags))
    try:
        yield {}
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
        for prompt in prompts:
            ids = prompt_ids(engine.tokenizer_manager.tokenizer, [{"role": "user", "content": prompt}], "--prompt")
            result = engine.generate(input_ids=ids, sampling_params=sampling)
            info = result["meta_info"]
            # Left out where the prefill alone finished the answer.
            verifications = info.get("spec_verify_ct", 0)
            yield {"text": result["text"], "tokens": info["completion_tokens"], "verifications": verifications}
    except UserError as error:
        yield {"error": str(error)}
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
