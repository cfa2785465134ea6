"""Target servers in threads of the test's process, and trivial targets."""

import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import torch
import uvicorn

from nemo_speculative.data.batch import Batch, Span
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.remote.server import ServerLimits, TargetServer

HIDDEN, VOCAB = 4, 50


class StandIn:
    """A target whose hidden states are a formula of ids and positions."""

    config = SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB)
    aux_layers, device, requests_ahead = [1, 2], torch.device("cpu"), 0

    def __init__(self, dtype=torch.float32, fingerprint="stand-in"):
        self.dtype, self.fingerprint = dtype, fingerprint
        self.read = []

    def compute_hidden_states(self, batch):
        self.read.append(batch.input_ids.tolist())
        hidden = (batch.input_ids + batch.positions / 64)[..., None] * torch.arange(1, HIDDEN + 1)
        hidden = hidden.to(self.dtype)
        return TargetOutput(torch.cat([hidden, -hidden], dim=-1), hidden / 2)


class Gated(StandIn):
    """A target that blocks until its gate opens, and counts concurrent calls."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.gate, self.inside, self.most = threading.Event(), 0, 0

    def compute_hidden_states(self, batch):
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.gate.wait(20)
        self.inside -= 1
        return super().compute_hidden_states(batch)


def batch_of(*ids, document=4):
    """One row of ``ids`` in documents of ``document`` tokens."""
    row = torch.tensor([ids])
    at = torch.arange(len(ids))[None]
    spans = tuple(Span(f"d{s}", 0, 0, s, min(s + document, len(ids))) for s in range(0, len(ids), document))
    return Batch(row, at % 2 == 1, at % document, at // document, spans)


def same(one, two):
    """Whether two outputs are equal bit for bit."""
    names = ("aux_hidden_states", "last_hidden_state")
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


@contextlib.contextmanager
def serving(target, *, port=0, token=None, queue=8, max_tokens=256, io_timeout=20.0, backend=None):
    """Runs a target server and yields it; ``url`` is its address."""
    listener = socket.create_server(("127.0.0.1", port))
    server = TargetServer(target, ServerLimits(queue, max_tokens, io_timeout), token, backend)
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    runner = uvicorn.Server(uvicorn.Config(server.app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=runner.run, args=([listener],), daemon=True)
    thread.start()
    until(lambda: runner.started)
    try:
        yield server
    finally:
        runner.should_exit = runner.force_exit = True
        thread.join(20)


def until(holds, seconds=20.0):
    """Waits until ``holds()`` is true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)
