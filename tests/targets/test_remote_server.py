"""The target server over real sockets: its answers, its refusals, and that no request stops it."""

import asyncio
import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from safetensors.torch import load

from nemo_speculative.config.schema import SGLangBackendConfig
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.remote.protocol import TargetIdentity, pack_batch
from nemo_speculative.targets.remote.server import BearerTokenMiddleware, ServerLimits
from nemo_speculative.utils.errors import UserError
from tests.target_servers import Gated, StandIn, batch_of, serving, until

BATCH = batch_of(*range(12))


def post(server, content=None, target=None, **headers):
    tag = TargetIdentity.of(target or StandIn()).tag
    content = pack_batch(BATCH) if content is None else content
    return httpx.post(f"{server.url}/supervise", content=content, headers={"If-Match": tag} | headers, timeout=30)


def answers_correctly(server):
    result, expected = load(post(server).content), StandIn().compute_hidden_states(BATCH)
    return torch.equal(result["aux"], expected.aux_hidden_states) and torch.equal(
        result["last_hidden"], expected.last_hidden_state
    )


def metric(server, name):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


def test_info_describes_the_target():
    backend = SGLangBackendConfig(
        _target_="nemo_speculative.targets.sglang.SGLangTarget", flags=["--quantization", "fp8"]
    )
    with serving(StandIn(dtype=torch.bfloat16), max_tokens=99, backend=backend) as server:
        info = httpx.get(f"{server.url}/info").json()
        assert (info["fingerprint"], info["dtype"], info["aux_layers"]) == ("stand-in", "bfloat16", [1, 2])
        assert (info["hidden_size"], info["max_tokens"]) == (4, 99) and "torch" in info["versions"]
        assert info["backend"]["_target_"].endswith("SGLangTarget")
        assert info["backend"]["flags"] == ["--quantization", "fp8"]
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_metrics_count_requests_tokens_and_bytes():
    with serving(StandIn()) as server:
        frame = pack_batch(BATCH)
        sizes = [len(post(server).content) for _ in range(3)]
        assert post(server, b"no frame").status_code == 400
        assert metric(server, 'nemo_target_requests_total{code="200"}') == 3
        assert metric(server, 'nemo_target_requests_total{code="400"}') == 1
        assert metric(server, "nemo_target_tokens_total") == 3 * 12
        assert metric(server, "nemo_target_sent_bytes_total") == sum(sizes)
        assert metric(server, "nemo_target_received_bytes_total") == 3 * len(frame) + len(b"no frame")
        assert metric(server, "nemo_target_busy_seconds_total") > 0 and metric(server, "nemo_target_queue_depth") == 0


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff" * 100,
        (1 << 60).to_bytes(8, "little") + b"{}",
        pack_batch(BATCH)[:-3],
        pack_batch(batch_of(*range(45, 57))),
    ],
    ids=["empty", "garbage", "oversized header", "truncated", "ids outside the vocabulary"],
)
def test_a_malformed_frame_is_rejected_and_the_server_continues(frame):
    target = StandIn()
    with serving(target) as server:
        refused = post(server, frame)
        assert refused.status_code == 400 and refused.text and "\n" not in refused.text
        assert not target.read and answers_correctly(server)


def test_more_tokens_than_allowed_are_rejected():
    with serving(StandIn(), max_tokens=8) as server:
        assert "this server takes 8" in post(server).text and post(server).status_code == 413
        assert post(server, b"\x00" * 10_000).status_code == 413


def test_requests_need_the_right_token():
    with serving(StandIn(), token="s3cret") as server:
        for wrong in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}):
            assert post(server, **wrong).status_code == 401
            assert {httpx.get(f"{server.url}/{p}", headers=wrong).status_code for p in ("info", "metrics")} == {401}
        assert post(server, Authorization="Bearer s3cret").status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(("pieces", "read"), [(3, 3), (10**6, 103)], ids=["whole body", "up to the limit"])
def test_the_body_is_read_before_a_401(pieces, read):
    """Closing a connection with unread bytes may lose the answer."""
    taken, sent = [], []

    async def receive():
        taken.append(None)
        return {"type": "http.request", "body": bytes(10), "more_body": len(taken) < pieces}

    async def send(message):
        sent.append((len(taken), message))

    scope = {"type": "http", "method": "POST", "path": "/supervise", "headers": []}
    limits = ServerLimits(queue=1, max_tokens=0, io_timeout=5.0)
    asyncio.run(BearerTokenMiddleware(None, "s3cret", limits)(scope, receive, send))
    assert sent[0][0] == len(taken) == read and sent[0][1]["status"] == 401


def test_a_401_does_not_wait_forever_for_the_body():
    with serving(StandIn(), token="s3cret", io_timeout=0.3) as server, raw(server) as slow:
        slow.sendall(head(1000) + b"\x00" * 10)
        assert b" 401 " in slow.recv(1000)


def health(server):
    result = httpx.get(f"{server.url}/health")
    return result.status_code, result.text


def test_health_fails_after_consecutive_failures():
    class Fails(StandIn):
        broken = True

        def compute_hidden_states(self, batch):
            if self.broken:
                raise RuntimeError("CUDA error")
            return super().compute_hidden_states(batch)

    target = Fails()
    with serving(target) as server:
        assert [post(server).status_code for _ in range(2)] == [500, 500] and health(server)[0] == 200
        post(server)
        assert health(server) == (503, "the target failed 3 times in a row\n")
        target.broken = False
        assert answers_correctly(server) and health(server) == (200, "ok\n")


def test_health_fails_while_a_forward_pass_hangs(monkeypatch):
    monkeypatch.setattr("nemo_speculative.targets.remote.server.UNHEALTHY_SECONDS", 0.2)
    target = Gated()
    with serving(target) as server, ThreadPoolExecutor(1) as clients:
        held = clients.submit(post, server)
        until(lambda: health(server)[0] == 503)
        assert "at one batch" in health(server)[1]
        target.gate.set()
        assert held.result().status_code == 200
        until(lambda: health(server)[0] == 200)


def test_no_more_requests_are_read_at_once_than_the_queue_holds():
    """The next request's bytes are not read until one of the current ones has arrived or timed out."""
    frame = pack_batch(BATCH)
    with serving(StandIn(), queue=1, io_timeout=1.5) as server, raw(server) as slow, raw(server) as next_one:
        slow.sendall(head(len(frame)) + frame[:-1])
        until(lambda: server._arriving.locked())
        next_one.sendall(head(len(frame)) + frame)
        assert metric(server, "nemo_target_received_bytes_total") == 0
        assert b" 408 " in slow.recv(1000) and b" 200 " in next_one.recv(1000)


def test_a_request_for_another_target_is_rejected_naming_both():
    with serving(StandIn()) as server:
        refused = post(server, target=StandIn(torch.bfloat16))
        assert refused.status_code == 412 and "stand-in:float32:1,2" in refused.text
        assert "stand-in:bfloat16:1,2" in refused.text
        assert httpx.post(f"{server.url}/supervise", content=pack_batch(BATCH)).status_code == 412


def test_a_full_queue_answers_429_and_loses_nothing():
    target = Gated()
    with serving(target, queue=2) as server, ThreadPoolExecutor(2) as clients:
        waiting = [clients.submit(post, server) for _ in range(2)]
        until(lambda: server.active == 2)
        full = post(server)
        assert full.status_code == 429 and float(full.headers["Retry-After"]) > 0
        assert metric(server, "nemo_target_queue_depth") == 2
        target.gate.set()
        assert [w.result().status_code for w in waiting] == [200, 200]
        assert target.most == 1, "targets are not thread-safe"
        assert answers_correctly(server)


def test_a_request_is_not_computed_if_its_client_disconnects():
    target = Gated()
    with serving(target) as server, ThreadPoolExecutor(2) as clients:
        first = clients.submit(post, server)
        until(lambda: target.inside == 1)
        with contextlib.suppress(httpx.ReadTimeout):
            tag = TargetIdentity.of(StandIn()).tag
            httpx.post(f"{server.url}/supervise", content=pack_batch(BATCH), headers={"If-Match": tag}, timeout=0.2)
        until(lambda: server.active == 1)
        target.gate.set()
        assert first.result().status_code == 200 and answers_correctly(server) and len(target.read) == 2
        assert metric(server, 'nemo_target_requests_total{code="499"}') == 1


def test_a_failure_of_the_target_fails_one_request():
    class Fails(StandIn):
        def compute_hidden_states(self, batch):
            if not self.read:
                self.read.append(None)
                raise RuntimeError("CUDA out of memory")
            return super().compute_hidden_states(batch)

    with serving(Fails()) as server:
        failed = post(server)
        assert failed.status_code == 500 and "CUDA out of memory" in failed.text
        assert answers_correctly(server)


def test_a_batch_refused_by_the_target_is_not_a_failure():
    class Refuses(StandIn):
        def compute_hidden_states(self, batch):
            raise UserError("a document has 9 tokens: lower data.max_length")

    with serving(Refuses()) as server:
        for _ in range(4):
            refused = post(server)
            assert (refused.status_code, refused.text) == (
                422, "the target refuses the batch: a document has 9 tokens: lower data.max_length"
            )  # fmt: skip
        assert health(server) == (200, "ok\n")


def raw(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def head(length):
    tag = TargetIdentity.of(StandIn()).tag
    return f"POST /supervise HTTP/1.1\r\nHost: x\r\nIf-Match: {tag}\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_request_that_does_not_arrive_times_out():
    with serving(StandIn(), io_timeout=0.3) as server, raw(server) as slow:
        slow.sendall(head(1000) + b"\x00" * 10)
        assert b" 408 " in slow.recv(1000)
        assert answers_correctly(server)


class Large(StandIn):
    """Its answers are larger than all socket buffers."""

    def compute_hidden_states(self, batch):
        self.read.append(batch)
        return TargetOutput(torch.zeros(1, 12, 1 << 21), torch.zeros(1, 12, 4))


def test_an_answer_that_is_not_read_releases_its_queue_slot():
    frame = pack_batch(BATCH)
    with serving(Large(), io_timeout=0.5, queue=1) as server, raw(server) as deaf:
        deaf.sendall(head(len(frame)) + frame)
        until(lambda: server.active == 1)
        until(lambda: server.active == 0)
        assert server.target.read and metric(server, 'nemo_target_requests_total{code="499"}') == 1


def test_concurrent_clients_get_their_own_answers():
    batches = [batch_of(*range(n, n + 12)) for n in range(24)]
    with serving(StandIn(), queue=32) as server, ThreadPoolExecutor(8) as clients:
        result = list(clients.map(lambda b: load(post(server, pack_batch(b)).content)["aux"], batches))
    assert all(
        torch.equal(f, StandIn().compute_hidden_states(b).aux_hidden_states)
        for f, b in zip(result, batches, strict=True)
    )


def test_one_thread_runs_the_target():
    class Notes(StandIn):
        def compute_hidden_states(self, batch):
            self.read.append(threading.get_ident())
            return StandIn().compute_hidden_states(batch)

    target = Notes()
    with serving(target) as server, ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda _: post(server), range(8)))
    assert len(target.read) == 8 and len(set(target.read)) == 1
