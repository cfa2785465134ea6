"""Answers to single prompts from SGLang's engine, without a server.

``sgl.Engine`` kills the process that created it when one of its own processes fails.  It therefore runs in a
subprocess, which is this module run as a program:

    python -m nemo_speculative.serving.engine DESCRIPTOR FLAG …       (the flags of sglang.launch_server)

It reads ``{"prompts", "max_new_tokens"}`` from standard input and writes one JSON object per line to the open file
DESCRIPTOR: ``{}`` when it is ready, then ``{"text", "tokens", "verifications"}`` for each prompt, or ``{"error"}``.
"""

import json
import os
import select
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_speculative.decoding.tau import acceptance_length
from nemo_speculative.serving.command import ServeOptions, serve_environment, serve_flags
from nemo_speculative.serving.server import STOP_SECONDS, SGLangProcess
from nemo_speculative.utils.errors import UserError

READ_BYTES = 1 << 16


@dataclass(frozen=True)
class EngineAnswer:
    """Text and counts of one answer."""

    text: str
    tokens: int
    verifications: int
    """Zero where the prefill alone finished the answer."""

    @property
    def statistics(self) -> str:
        """The counts in words; acceptance length is SGLang's: tokens, the prefill's included, per verification."""
        tau = acceptance_length(self.tokens, self.verifications)
        length = f", acceptance length {tau:.2f}" if tau else ""
        return f"{self.tokens} tokens in {self.verifications} verifications{length}"


def engine_answers(
    options: ServeOptions, prompts: Sequence[str], max_new_tokens: int, timeout: float, log: Path
) -> Generator[EngineAnswer]:
    """Yields the greedy answer to each of ``prompts``.

    Args:
        timeout: seconds to wait until the engine is ready, and then for each answer.
        log: the file that receives all output of SGLang.

    Raises:
        ServerError: the engine did not start, died, or does not answer.
        UserError: the chat template rejects a prompt.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+") as request, os.fdopen(reading, "rb", buffering=0):
        json.dump({"prompts": prompts, "max_new_tokens": max_new_tokens}, request)
        request.flush()
        request.seek(0)
        command = [sys.executable, "-m", __name__, str(writing), *serve_flags(options)]
        try:
            process = SGLangProcess(command, serve_environment(options), log, stdin=request, pass_fds=(writing,))
        finally:
            os.close(writing)  # the subprocess holds the only copy, so that its death ends the file
        with process:
            lines = _Lines(reading)
            _next_object(lines, process, timeout, "ready")
            for _ in prompts:
                yield EngineAnswer(**_next_object(lines, process, timeout, "done with its answer"))
            with suppress(TimeoutError):
                lines.next(STOP_SECONDS)  # end of file: the engine has ended its own processes


class _Lines:
    """Lines of a pipe, read with a timeout."""

    def __init__(self, descriptor: int):
        self._descriptor, self._buffer = descriptor, b""

    def next(self, timeout: float) -> bytes:
        """The next complete line; empty at the end of the file.

        Raises:
            TimeoutError: it did not come within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            if not select.select([self._descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError
            if not (read := os.read(self._descriptor, READ_BYTES)):
                return b""  # drops a line that the writer's death cut off
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _next_object(lines: _Lines, process: SGLangProcess, timeout: float, state: str) -> dict[str, Any]:
    """The subprocess's next object; ``state`` says in errors what was waited for."""
    try:
        line = lines.next(timeout)
    except TimeoutError:
        raise process.failure(f"SGLang was not {state} after {timeout:g} s") from None
    if not line:
        raise process.exit_error(f"before it was {state}")
    content = json.loads(line)
    if "error" in content:
        raise UserError(content["error"])
    return content


def main(descriptor: str, *flags: str) -> None:
    """The program that runs the engine."""
    os.set_inheritable(int(descriptor), False)
    request = json.load(sys.stdin)
    with os.fdopen(int(descriptor), "w", buffering=1) as out:
        for line in _run_engine(list(flags), request["prompts"], request["max_new_tokens"]):
            out.write(json.dumps(line) + "\n")


def _run_engine(flags: list[str], prompts: list[str], max_new_tokens: int) -> Iterator[dict[str, Any]]:
    import sglang
    from sglang.srt.server_args import prepare_server_args

    from nemo_speculative.data.chat_template import prompt_ids

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
