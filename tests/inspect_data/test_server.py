"""Requests to a running server, and every way in which they fail."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nemo_speculative.inspect_data.comparison import Comparison, RunningServer
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import Refused, Unreachable
from nemo_speculative.utils.network import free_port
from tests.conftest import make_tokenizer
from tests.inspect_data.conftest import dialogue

GOOD = b'{"tokens": [1, 2, 3], "count": 3, "max_model_len": 9}'


@contextmanager
def serve(answer, requests=None) -> Iterator[str]:
    """The URL of a server that answers each request by ``answer(body) -> (status, bytes)``."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if requests is not None:
                requests.append((self.path, self.headers.get("Authorization"), body))
            status, message = answer(body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(message)))
            self.end_headers()
            self.wfile.write(message)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_requests_and_responses():
    requests, talk = [], dialogue("u:hello")
    with serve(lambda _: (200, GOOD), requests) as url, RunningServer(url + "/", "secret") as server:
        server.check()
        assert server.prompt_ids(talk.messages, None) == [1, 2, 3]
        assert server.prompt_ids(talk.messages, [{"type": "function"}]) == [1, 2, 3]
    assert {(path, token) for path, token, _ in requests} == {("/tokenize", "Bearer secret")}
    assert requests[1][2] == {"messages": talk.messages}
    assert requests[2][2] == {"messages": talk.messages, "tools": [{"type": "function"}]}


@pytest.mark.parametrize(
    "answer",
    [(404, b"{}"), (422, b'{"detail": "prompt: Field required"}'), (200, b"<html>"), (200, b"[]"),
     (200, b'{"tokens": "all"}'), (200, b'{"tokens": [[1]]}'), (500, b"")],
)  # fmt: skip
def test_a_server_that_does_not_return_ids(answer):
    with serve(lambda _: answer) as url, RunningServer(url) as server, pytest.raises(UserError) as caught:
        server.check()
    message = str(caught.value)
    assert message.startswith(f"url: {url}/tokenize: HTTP {answer[0]}") and "expected an SGLang server" in message
    assert "\n" not in message


def test_a_server_that_requires_another_token():
    message = r"url: .*: refuses the token \(HTTP 401\); set the variable SGLANG_API_KEY"
    with serve(lambda _: (401, b"{}")) as url, RunningServer(url) as server, pytest.raises(UserError, match=message):
        server.check()


@pytest.mark.parametrize("url", ["http://127.0.0.1:PORT", "nowhere", "http://["])
def test_an_unreachable_server(url):
    url = url.replace("PORT", str(free_port()))
    with RunningServer(url) as server, pytest.raises(Unreachable) as caught:
        server.check()
    assert str(caught.value).startswith(f"url: {url}: cannot be reached")
    assert "\n" not in str(caught.value)


def test_a_refused_prompt_does_not_end_the_comparison():
    tokenizer = make_tokenizer()

    def render(body):
        if any("bad" in m["content"] for m in body["messages"]):
            return 400, b'{"message": "no such content"}'
        ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
        return 200, json.dumps({"tokens": ids}).encode()

    with serve(render) as url, RunningServer(url) as server:
        comparison = Comparison(tokenizer, server, 100, 10)
        for talk in (dialogue("u:bad", "a:x"), dialogue("u:good", "a:x", "u:more", "a:y")):
            comparison.add(talk, None)
    assert (comparison.turns, comparison.equal) == (3, 2)
    assert "HTTP 400" in comparison.differences[0].note


def test_a_refusal_raises_refused():
    with serve(lambda _: (400, b"{}")) as url, RunningServer(url) as server, pytest.raises(Refused):
        server.prompt_ids(dialogue("u:a").messages, None)
