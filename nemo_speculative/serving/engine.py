"""Answers to single prompts from SGLang's engine, without a server.

``sgl.Engine`` kills the process that created it when one of its own processes fails.  It therefore runs in a
subprocess, which is this module run as a program:

    python -m nemo_speculative.serving.engine DESCRIPTOR FLAG …       (the flags of sglang.launch_server)

DESCRIPTOR is one end of a :func:`multiprocessing.Pipe`; its messages are JSON.  The program receives ``{"prompts",
"max_new_tokens"}`` and sends ``{}`` when it is ready, then ``{"text", "tokens", "verifications"}`` for each prompt, or
``{"error"}``.
"""

import json
import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from nemo_speculative.serving.command import ServeOptions, serve_environment, serve_flags
from nemo_speculative.serving.server import STOP_SECONDS, SGLangProcess
from nemo_speculative.utils.errors import UserError


class EngineAnswer(NamedTuple):
    """Text and counts of one answer."""

    text: str
    tokens: int
    verifications: int
    """Zero where the prefill alone finished the answer."""


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
    connection, remote = Pipe()
    with connection:
        with remote:  # the subprocess holds the only copy, so that its death closes the pipe
            command = [sys.executable, "-m", __name__, str(remote.fileno()), *serve_flags(options)]
            process = SGLangProcess(command, serve_environment(options), log, pass_fds=(remote.fileno(),))
        with process:
            with suppress(BrokenPipeError):  # a subprocess that died is reported below
                connection.send_bytes(json.dumps({"prompts": prompts, "max_new_tokens": max_new_tokens}).encode())
            _receive(connection, process, timeout, "ready")
            for _ in prompts:
                yield EngineAnswer(**_receive(connection, process, timeout, "done with its answer"))
            connection.poll(STOP_SECONDS)  # until it is closed: the engine has ended its own processes


def _receive(connection: Connection, process: SGLangProcess, timeout: float, state: str) -> dict[str, Any]:
    """The subprocess's next message; ``state`` says in errors what was waited for."""
    try:
        if not connection.poll(timeout):
            raise process.failure(f"SGLang was not {state} after {timeout:g} s")
        message = json.loads(connection.recv_bytes())
    except (EOFError, OSError):  # closed, or cut off in the middle of a message
        raise process.exit_error(f"before it was {state}") from None
    if "error" in message:
        raise UserError(message["error"])
    return message


def main(descriptor: str, *flags: str) -> None:
    """Runs the engine; the program of this module."""
    os.set_inheritable(int(descriptor), False)
    with Connection(int(descriptor)) as connection:
        request = json.loads(connection.recv_bytes())
        for message in _run_engine(list(flags), request["prompts"], request["max_new_tokens"]):
            connection.send_bytes(json.dumps(message).encode())


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
            verifications = info.get("spec_verify_ct", 0)
            yield {"text": result["text"], "tokens": info["completion_tokens"], "verifications": verifications}
    except UserError as error:
        yield {"error": str(error)}
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
