"""Speed of a target server and a trainer on the same machine, compared with a bare socket that sends as many bytes.

python -m benchmarks.target_server [--rounds 9] [--requests 4]

"ready tensors" is a target of Llama-3.1-8B's width and dtype that computes nothing, so that only the transfer remains.
The bare socket reuses its memory, the best case of the loopback; "new memory" is the same socket with new memory for
each answer, as a trainer's tensors need.  Server and client are separate processes.  Medians of interleaved rounds;
ratios are to the bare socket in the same round, those of the small model to the same model in process.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_speculative.data.batch import Batch
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.demo import train_tokenizer
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.remote.client import RemoteTarget, ServerConnection, ServerPool
from nemo_speculative.targets.remote.protocol import OutputLayout, TargetIdentity, pack_batch
from nemo_speculative.targets.remote.server import ServerLimits, TargetServer

TOKENS, HIDDEN, AUX, VOCAB = 2048, 4096, 3, 512
ANSWER_BYTES = TOKENS * (AUX + 1) * HIDDEN * torch.bfloat16.itemsize
SMALL = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": TOKENS,
}  # fmt: skip
Ask = Callable[[], object]


class ReadyTensors:
    """A target that always returns the same tensors."""

    config = SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB)
    fingerprint, aux_layers, device, requests_ahead = "ready", list(range(AUX)), torch.device("cpu"), 0
    dtype = torch.bfloat16

    def __init__(self) -> None:
        width = HIDDEN * AUX
        self.answer = TargetOutput(*(torch.randn(1, TOKENS, w).bfloat16() for w in (width, HIDDEN)))

    def compute_hidden_states(self, _batch: Batch) -> TargetOutput:
        return self.answer


def serve(directory: str | None, port: Any) -> None:
    """Runs a target server of the model in ``directory``, or of ready tensors."""
    torch.set_num_threads(1)
    target: Any = HFTarget(Path(directory), aux_layers=None) if directory else ReadyTensors()
    listener = socket.create_server(("127.0.0.1", 0))
    app = TargetServer(target, ServerLimits(queue=8, max_tokens=TOKENS, io_timeout=60)).app
    port.send(listener.getsockname()[1])
    uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off")).run([listener])


def pour(_directory: None, port: Any) -> None:
    """Runs the server of the bare socket: it answers each byte with as many bytes as an answer of a target has."""
    listener, data = socket.create_server(("127.0.0.1", 0)), memoryview(bytearray(os.urandom(1 << 20)) * 64)
    port.send(listener.getsockname()[1])
    connection, _ = listener.accept()
    while connection.recv(1):
        for start in range(0, ANSWER_BYTES, len(data)):
            connection.sendall(data[: ANSWER_BYTES - start])


def started(stack: ExitStack, program: Callable[..., None], directory: str | None = None) -> int:
    """Starts a process that runs ``program`` until ``stack`` closes; returns its port."""
    receiver, sender = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=program, args=(directory, sender), daemon=True)
    process.start()
    stack.callback(process.terminate)
    return receiver.recv()


def batch() -> Batch:
    at = torch.arange(TOKENS)[None]
    return Batch(at % VOCAB, at > 9, positions=at % 256, documents=at // 256)


def make_model(directory: str) -> None:
    """A random Llama that one core runs in about a second."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(directory)
    train_tokenizer([], VOCAB).save_pretrained(directory)


def socket_ways(port: int) -> dict[str, Ask]:
    connection = socket.create_connection(("127.0.0.1", port))
    used = memoryview(bytearray(ANSWER_BYTES))

    def fetch(into: memoryview) -> None:
        connection.sendall(b"x")
        at = 0
        while at < len(into):
            at += connection.recv_into(into[at:])

    return {
        "bare socket": lambda: fetch(used),
        "bare socket, new memory": lambda: fetch(torch.empty(ANSWER_BYTES, dtype=torch.uint8).numpy().data),
    }


def server_ways(port: int, requests: int) -> dict[str, Callable[[], object]]:
    """Requests one at a time, and two at once, as a training sends them."""
    servers = ServerPool(
        [ServerConnection(f"http://127.0.0.1:{port}", 60, 60)], timeout=60, attempts=1, backoff_seconds=1
    )
    identity, request = TargetIdentity.of(ReadyTensors()), batch()  # type: ignore[arg-type]
    layout, frame = OutputLayout.of(request, HIDDEN, identity), pack_batch(request)
    threads = ThreadPoolExecutor(2)

    def at_once() -> None:
        for done in [threads.submit(servers.request, frame, identity, layout) for _ in range(requests)]:
            done.result()

    return {
        "ready tensors, one at a time": lambda: [servers.request(frame, identity, layout) for _ in range(requests)],
        "ready tensors, two at once": at_once,
    }


def model_ways(port: int, directory: str) -> dict[str, Ask]:
    local = HFTarget(Path(directory), aux_layers=None)
    remote = RemoteTarget(Path(directory), aux_layers=None, urls=[f"http://127.0.0.1:{port}"])
    request = batch()
    return {
        "small model, in process": lambda: local.compute_hidden_states(request),
        "small model, served": lambda: remote.compute_hidden_states(request),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=4, help="requests of one measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        make_model(directory)
        each = {**socket_ways(started(stack, pour)), **model_ways(started(stack, serve, directory), directory)}
        ways = {name: repeated(ask, options.requests) for name, ask in each.items()}
        ways |= server_ways(started(stack, serve), options.requests)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds + 1):
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                if number:  # the first one warms up
                    seconds[name].append((time.perf_counter() - start) / options.requests)
    report(seconds)


def repeated(ask: Ask, times: int) -> Ask:
    return lambda: [ask() for _ in range(times)]


def report(seconds: dict[str, list[float]]) -> None:
    """Prints the table."""
    token = {"small": 4 * (AUX + 1) * SMALL["hidden_size"]}
    print(f"answers of {TOKENS} tokens; {torch.__version__}, one thread a process")
    print(f"{'':30}{'bytes/token':>12}{'MB/s':>8}{'tokens/s':>10}  ratio (min to max)")
    for name, times in seconds.items():
        small = name.startswith("small")
        size = token["small"] if small else ANSWER_BYTES // TOKENS
        base = seconds["small model, in process" if small else "bare socket"]
        ratios = [b / t for b, t in zip(base, times, strict=True)]
        rate = TOKENS / statistics.median(times)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:30}{size:12}{rate * size / 1e6:8.0f}{rate:10.0f}  {spread}")


if __name__ == "__main__":
    main()
