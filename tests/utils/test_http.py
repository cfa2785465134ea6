"""The HTTP clients against a scripted server, and the load balancer."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nemo_speculative.utils.http import (
    AsyncClient,
    BalancedServer,
    Client,
    LoadBalancer,
    NotConnected,
    Unauthorized,
    Unreachable,
)
from nemo_speculative.utils.network import free_port


class Echo(BaseHTTPRequestHandler):
    """Returns the path, the token and the body; /status/N with that status; /close ends the connection."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if self.path.endswith("/close"):
            self.close_connection = True
            return
        status = int(self.path.rpartition("/")[2]) if "/status/" in self.path else 200
        content = json.dumps([self.path, self.headers.get("Authorization"), body]).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST


@pytest.fixture(scope="module")
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def blocking(url, method, path, token=None, **body):
    with Client(url, token, timeout=5.0) as client:
        response = client.request(method, path, **body)
        return response.status, response.data


def asynchronous(url, method, path, token=None, **body):
    async def send():
        async with AsyncClient(url, token, timeout=5.0) as client:
            response = await client.request(method, path, **body)
            return response.status_code, response.content

    return asyncio.run(send())


both = pytest.mark.parametrize("send", [blocking, asynchronous])


@both
def test_requests_carry_the_url_path_the_token_and_the_body(send, url):
    status, content = send(f"{url}/prefix/", "POST", "/x", "secret", json={"a": "ä"})
    assert (status, json.loads(content)) == (200, ["/prefix/x", "Bearer secret", '{"a":"ä"}'])
    assert json.loads(send(url, "GET", "/y")[1]) == ["/y", None, ""]


@both
def test_an_error_status_is_returned_and_a_wrong_token_raised(send, url):
    assert send(url, "GET", "/status/503")[0] == 503
    for status in (401, 403):
        with pytest.raises(Unauthorized, match=rf"{url}: refuses the token \(HTTP {status}\); set .* SGLANG_API_KEY"):
            send(url, "GET", f"/status/{status}")


@both
def test_a_closed_port_and_a_broken_connection_are_told_apart(send, url):
    closed = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(NotConnected, match=f"{closed}: cannot be reached .*; is an SGLang server running there?"):
        send(closed, "GET", "/")
    with pytest.raises(Unreachable) as caught:
        send(url, "POST", "/close", json={})
    assert not isinstance(caught.value, NotConnected) and "\n" not in str(caught.value)
    assert url not in caught.value.reason


@both
@pytest.mark.parametrize("bad", ["http://[", "http://"])
def test_an_invalid_url_is_unreachable(send, bad):
    with pytest.raises(Unreachable, match="cannot be reached"):
        send(bad, "GET", "/")


def balancer(count=3, **options):
    return LoadBalancer([BalancedServer(f"server {n}") for n in range(count)], **options)


def test_the_least_loaded_server_is_chosen_and_equals_take_turns():
    pool = balancer()
    first, second, third = pool.servers
    assert [pool.acquire() for _ in range(4)] == [first, second, third, first]
    pool.release(third)
    assert pool.acquire() is third
    pool.release(second)
    assert pool.acquire(candidates=[first, third]) is third
    assert pool.acquire(avoid=second) is first, "one more request each is better than the avoided server"
    assert pool.acquire(candidates=[second], avoid=second) is second


def test_the_limit_of_outstanding_requests():
    pool = balancer(1, max_outstanding=2)
    (server,) = pool.servers
    assert [pool.acquire() for _ in range(3)] == [server, server, None]
    pool.release(server)
    assert pool.acquire() is server


def test_a_failed_server_backs_off_longer_each_time_and_then_gets_one_request(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pool = balancer(1, first_backoff=1.0, max_backoff=4.0)
    (server,) = pool.servers
    for expected in (1.0, 2.0, 4.0, 4.0):
        pool.failed(server, "HTTP 500")
        assert 0.5 * expected <= server.retry_at - now[0] <= 1.5 * expected
        assert pool.acquire() is None
        now[0] = server.retry_at
        assert [pool.acquire(), pool.acquire()] == [server, None]
        pool.release(server)
    assert server.health_error == "HTTP 500"
    pool.succeeded(server)
    assert server.health_error is None and [pool.acquire(), pool.acquire()] == [server, server]


def test_a_paused_server_is_left_alone_without_a_failure(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pool = balancer(2)
    first, second = pool.servers
    pool.pause(first, 3.0)
    assert [pool.acquire(), pool.acquire()] == [second, second]
    now[0] = 3.0
    assert pool.acquire() is first and first.health_error is None
