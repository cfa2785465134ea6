"""The remote target: the same hidden states as in this process, whatever the servers do."""

import contextlib
import http.server
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from nemo_speculative.config.schema import RemoteBackendConfig
from nemo_speculative.data.batch import collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.distributed.context_parallel import ContextGroup
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.remote.client import RemoteTarget, ServerConnection, ServerPool
from nemo_speculative.targets.remote.protocol import (
    TOKEN_VARIABLE,
    OutputLayout,
    TargetIdentity,
    bearer_token,
    pack_batch,
    pack_output,
)
from nemo_speculative.utils.errors import PeerLostError, UserError
from nemo_speculative.utils.network import free_port
from tests.target_servers import HIDDEN, Gated, StandIn, batch_of, same, serving, until

BATCH = batch_of(*range(12))
IDENTITY = TargetIdentity.of(StandIn())
FRAME = b"".join(pack_output(StandIn().compute_hidden_states(BATCH)))


def servers_at(*urls, timeout=20.0, attempts=2, backoff_seconds=0.05):
    servers = [ServerConnection(url, timeout, connect_timeout=2.0) for url in urls]
    return ServerPool(servers, timeout, attempts, backoff_seconds)


def request(servers, batch=BATCH):
    return servers.request(pack_batch(batch), IDENTITY, OutputLayout.of(batch, HIDDEN, IDENTITY))


def right(result, batch=BATCH):
    return same(result, StandIn().compute_hidden_states(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aux_layers", [None, []], ids=["eagle3", "eagle1"])
def test_hidden_states_of_packed_rows_equal_those_in_process_bit_for_bit(target_dir, dtype, aux_layers):
    documents = [
        TokenRow(f"c{n}", [(7 * n + t) % 300 for t in range(n)], [t > 2 for t in range(n)], "") for n in (9, 30, 17)
    ]
    batch = collate([documents, documents[1:], [documents[0]] * 4], 64, pad_id=1)
    local = HFTarget(target_dir, aux_layers=aux_layers, dtype=dtype)
    with serving(HFTarget(target_dir, aux_layers=aux_layers, dtype=dtype)) as server:
        remote = RemoteTarget(target_dir, aux_layers=aux_layers, dtype=dtype, urls=[server.url])
        result, expected = remote.compute_hidden_states(batch), local.compute_hidden_states(batch)
        shard = ContextGroup.planned(2).shard(batch.num_tokens, halo=3)
        assert same(remote.compute_hidden_states(replace(batch, shard=shard)), expected.shard(shard))
    assert (
        same(result, expected)
        and result.aux_hidden_states.dtype == dtype
        and result.aux_hidden_states.shape[-1] == 32 * len(local.aux_layers)
    )
    ids = batch.input_ids
    assert torch.equal(remote.embed(ids), local.embed(ids)) and remote.fingerprint == local.fingerprint
    assert torch.equal(remote.logits(result.last_hidden_state), local.logits(expected.last_hidden_state))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"aux_layers": [0, 2, 4]}, r"aux_layers is \[0, 2, 4\] there and \[1, 3, 4\] here"),
        ({"aux_layers": None, "dtype": torch.bfloat16}, "dtype is bfloat16 there and float32 here"),
    ],
)
def test_another_target_is_rejected_at_the_start(target_dir, there, message):
    with serving(HFTarget(target_dir, **there)) as server, pytest.raises(UserError, match=message) as refused:
        RemoteTarget(target_dir, aux_layers=None, urls=[server.url])
    assert server.url in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": []}, "backend.urls is empty"),
        ({"urls": ["10.0.0.7:31000"]}, "backend.urls holds '10.0.0.7:31000': expected http://HOST:PORT"),
        ({"urls": ["http://"]}, "backend.urls holds 'http://': expected"),
        ({"urls": ["http://host:abc"]}, "backend.urls holds 'http://host:abc': expected"),
        ({"urls": ["http://host:99999"]}, "backend.urls holds 'http://host:99999': expected"),
        ({"urls": ["http:///path"]}, "backend.urls holds 'http:///path': expected"),
        ({"urls": ["ftp://host:1"]}, "backend.urls holds 'ftp://host:1': expected"),
        ({"urls": ["http://a:1", "http://b:1", "http://A:1/"]}, "names the server 'http://A:1/' twice"),
        ({"urls": ["http://a", "http://a:80"]}, "names the server 'http://a:80' twice"),
        ({"attempts": 0}, "backend.attempts is 0"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(UserError, match=message):
        RemoteBackendConfig(**({"urls": ["http://127.0.0.1:31000"]} | settings))


def test_servers_may_share_a_host_or_a_port():
    RemoteBackendConfig(urls=["http://a:1", "http://a:2", "https://b:1/x", "https://b:1/y", "http://[::1]:1"])


def test_other_weights_are_rejected_at_the_start():
    message = "fingerprint is other there and stand-in here"
    with serving(StandIn(fingerprint="other")) as server, pytest.raises(UserError, match=message):
        servers_at(server.url).check(IDENTITY)


def test_an_unreachable_server_is_named_at_the_start():
    with serving(StandIn()) as server:
        gone = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(UserError, match=rf"{gone} does not answer as a target server .*serve_target"):
            servers_at(server.url, gone).check(IDENTITY)


def test_another_kind_of_server_is_rejected():
    with answering(200, b"<html>hello</html>") as url, pytest.raises(UserError, match="not a target server"):
        servers_at(url).check(IDENTITY)
    with answering(200, b'{"status": "fine"}') as url, pytest.raises(UserError, match="does not answer as a target"):
        servers_at(url).check(IDENTITY)


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_wrong_token_is_rejected(monkeypatch, token):
    monkeypatch.setenv(TOKEN_VARIABLE, token) if token else monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with serving(StandIn(), token="right") as server:
        with pytest.raises(UserError, match=f"{server.url}: refuses the token .*{TOKEN_VARIABLE}"):
            servers_at(server.url).check(IDENTITY)
        monkeypatch.setenv(TOKEN_VARIABLE, "right")
        servers_at(server.url).check(IDENTITY)
        assert right(request(servers_at(server.url)))


@pytest.mark.parametrize("token", ["", " ", "two words", "two\nlines", "gehëim"])
def test_a_token_that_no_header_can_hold_is_rejected_and_not_printed(monkeypatch, token):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(UserError, match=TOKEN_VARIABLE) as refused:
        servers_at("http://127.0.0.1:1")
    assert not token.strip() or token not in str(refused.value)


def test_a_token_from_a_file_may_end_with_a_line_break(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "right\n")
    assert bearer_token() == "right"
    with serving(StandIn(), token="right") as server:
        servers_at(server.url).check(IDENTITY)


def test_a_target_that_changes_during_a_run_is_rejected():
    port = free_port()
    with serving(StandIn(), port=port) as server:
        servers = servers_at(server.url)
        assert right(request(servers))
    with serving(StandIn(torch.bfloat16), port=port), pytest.raises(UserError, match="stand-in:bfloat16"):
        request(servers)


def test_a_batch_that_is_too_large_is_rejected_with_the_remedy():
    message = r"takes 8 at once.*micro_batch_size"
    with serving(StandIn(), max_tokens=8) as server, pytest.raises(UserError, match=message):
        request(servers_at(server.url))


def test_concurrent_requests_are_spread_over_the_servers():
    targets = [Gated(), Gated()]
    with serving(targets[0]) as one, serving(targets[1]) as two, ThreadPoolExecutor(4) as threads:
        servers = servers_at(one.url, two.url)
        batches = [batch_of(*range(n, n + 12)) for n in range(4)]
        futures = [threads.submit(request, servers, batch) for batch in batches]
        until(lambda: [one.active, two.active] == [2, 2])
        for target in targets:
            target.gate.set()
        assert all(right(a.result(), b) for a, b in zip(futures, batches, strict=True))


def test_sequential_requests_alternate_between_the_servers():
    targets = [StandIn(), StandIn()]
    with serving(targets[0]) as one, serving(targets[1]) as two:
        servers = servers_at(one.url, two.url)
        assert all(right(request(servers)) for _ in range(6))
    assert [len(t.read) for t in targets] == [3, 3]


def test_a_slow_server_gets_fewer_requests():
    slow, quick = Gated(), StandIn()
    with serving(slow) as one, serving(quick) as two, ThreadPoolExecutor(1) as threads:
        servers = servers_at(one.url, two.url)
        held = threads.submit(request, servers)
        until(lambda: slow.inside == 1)
        assert all(right(request(servers)) for _ in range(4)) and len(quick.read) == 4
        slow.gate.set()
        assert right(held.result())


def test_full_queues_are_retried_and_nothing_is_lost(monkeypatch):
    """Six clients of a server with room for one."""
    monkeypatch.setattr("nemo_speculative.targets.remote.server.RETRY_AFTER_SECONDS", 0.02)
    target, batches = StandIn(), [batch_of(*range(n, n + 12)) for n in range(30)]
    with serving(target, queue=1) as server, ThreadPoolExecutor(6) as threads:
        clients = [servers_at(server.url, attempts=1) for _ in range(6)]
        result = list(threads.map(lambda n: request(clients[n % 6], batches[n]), range(30)))
    assert all(right(f, b) for f, b in zip(result, batches, strict=True)) and len(target.read) == 30


def test_a_queue_that_stays_full_ends_the_run(monkeypatch):
    monkeypatch.setattr("nemo_speculative.targets.remote.server.RETRY_AFTER_SECONDS", 0.05)
    target = Gated()
    with serving(target, queue=1) as server, ThreadPoolExecutor(1) as threads:
        held = threads.submit(request, servers_at(server.url))
        until(lambda: target.inside == 1)
        with pytest.raises(UserError, match=f"no target server answers any more .*{server.url}.*queue is full"):
            request(servers_at(server.url, timeout=0.3))
        target.gate.set()
        assert right(held.result())


class FailsOnce(StandIn):
    def compute_hidden_states(self, batch):
        self.read.append(None)
        if len(self.read) == 1:
            raise RuntimeError("CUDA out of memory")
        return StandIn().compute_hidden_states(batch)


def test_a_failed_request_is_retried_at_another_server():
    broken, sound = FailsOnce(), StandIn()
    with serving(broken) as one, serving(sound) as two:
        servers = servers_at(one.url, two.url, backoff_seconds=30.0)
        assert all(right(request(servers)) for _ in range(3))
        assert len(broken.read) == 1 and len(sound.read) == 3, "a failed server backs off"


def test_a_batch_that_the_target_refuses_is_not_retried():
    """Other servers of the same target would refuse it, too."""

    class Refuses(StandIn):
        def compute_hidden_states(self, batch):
            self.read.append(None)
            raise UserError("backend.max_tokens: a document has 9 tokens")

    one, two = Refuses(), Refuses()
    with serving(one) as first, serving(two) as second, pytest.raises(UserError, match=r"a document has 9 tokens"):
        request(servers_at(first.url, second.url))
    assert len(one.read) + len(two.read) == 1


def test_a_server_that_died_is_used_again_when_it_is_back(capsys):
    port, other = free_port(), StandIn()
    with serving(other) as two:
        with serving(StandIn(), port=port) as one:
            servers = servers_at(one.url, two.url)
            assert right(request(servers)) and right(request(servers))
        assert all(right(request(servers)) for _ in range(3)) and len(other.read) == 4
        back = StandIn()
        with serving(back, port=port):
            until(lambda: right(request(servers)) and back.read)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"target server {one.url} fails (") and last == f"target server {one.url} answers again"


def test_when_all_servers_are_dead_one_line_names_them():
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    with pytest.raises(
        PeerLostError, match=f"no target server answers any more .{urls[0]}, {urls[1]}.*resume=auto"
    ) as end:
        request(servers_at(*urls))
    assert "\n" not in str(end.value)


@contextlib.contextmanager
def silent():
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def replying(reply):
    """A server that answers every request with ``reply()``: status, content, and further headers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content, headers = reply()
            self.send_response(status)
            for name, value in ({"Content-Length": len(content)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def answering(status, content, length=None):
    """A server that always gives the same answer; ``length`` is its Content-Length header."""
    return replying(lambda: (status, content, {"Content-Length": length or len(content)}))


def full(times):
    """A server whose queue is full for the first ``times`` requests."""
    left = iter(range(times))
    full_once = (429, b"full", {"Retry-After": "0.05"})
    return replying(lambda: full_once if next(left, None) is not None else (200, FRAME, {}))


@pytest.mark.parametrize(
    "bad",
    [
        silent,
        lambda: answering(503, b"going down"),
        lambda: answering(200, b"no frame"),
        lambda: answering(200, FRAME + b"\x00"),
        lambda: answering(200, b"\xff" * len(FRAME)),
        lambda: answering(200, b"cut off", length=len(FRAME)),
    ],
    ids=["never answers", "going down", "short", "long", "no frame", "dies in its answer"],
)
def test_an_invalid_answer_is_retried_at_another_server(bad):
    with bad() as url, serving(StandIn()) as server:
        servers = servers_at(url, server.url, timeout=0.5, backoff_seconds=30.0)
        assert all(right(request(servers)) for _ in range(2))
        assert servers.servers[0].last_acquired == 1, "it got the first request only"


@pytest.mark.parametrize("hangs_first", [True, False])
def test_the_timeout_of_a_hanging_server_does_not_count_against_a_full_one(hangs_first):
    with silent() as hangs, full(times=2) as busy:
        servers = servers_at(*((hangs, busy) if hangs_first else (busy, hangs)), timeout=0.4, backoff_seconds=30.0)
        assert right(request(servers)) and servers._count == 4


def test_failures_of_a_dead_server_do_not_use_up_the_attempts_at_a_full_one():
    """The dead server fails as often as both may together before the other has a free place."""
    dead = f"http://127.0.0.1:{free_port()}"
    with full(times=12) as busy:
        servers = servers_at(dead, busy, attempts=3, backoff_seconds=0.01)
        assert right(request(servers)) and servers.servers[0].health_error
    with full(times=10**6) as busy, pytest.raises(UserError, match="queue is full"):
        request(servers_at(dead, busy, timeout=0.5, attempts=3, backoff_seconds=0.01))


def test_attempts_are_counted_per_server():
    with answering(503, b"going down") as one, answering(503, b"going down") as two:
        servers = servers_at(one, two, attempts=3, backoff_seconds=0.01)
        with pytest.raises(UserError, match="no target server answers any more"):
            request(servers)
        assert servers._count == 6


def test_a_server_that_is_back_gets_its_share_and_no_more(monkeypatch):
    port, other, back = free_port(), StandIn(), StandIn()
    with serving(other) as two:
        servers = servers_at(f"http://127.0.0.1:{port}", two.url, backoff_seconds=0.01)
        servers.pause(servers.servers[0], 3600)
        assert all(right(request(servers)) for _ in range(6))
        with serving(back, port=port):
            servers.pause(servers.servers[0], 0)
            assert all(right(request(servers)) for _ in range(6))
    assert (len(back.read), len(other.read)) == (3, 6 + 3)


def test_a_single_server_that_never_answers_ends_the_run():
    with silent() as url, pytest.raises(UserError, match="ReadTimeoutError"):
        request(servers_at(url, timeout=0.2))
