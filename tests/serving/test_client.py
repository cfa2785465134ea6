"""The benchmark client, against a small server with scripted chunks and delays."""

import asyncio
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from nemo_speculative.serving.client import Answer, Client
from nemo_speculative.utils.http import Refused, Unauthorized, Unreachable

TOKEN = "a-token"


def chunk(text, tokens, finish=None, **info):
    meta = {"completion_tokens": tokens, "prompt_tokens": 3, "finish_reason": finish and {"type": finish}, **info}
    return {"text": text, "meta_info": meta}


def aborted(status, message):
    meta = {"completion_tokens": 0, "prompt_tokens": 3}
    reason = {"type": "abort", "status_code": status, "message": message}
    return {"text": "", "meta_info": {**meta, "finish_reason": reason}}


class Scripted(BaseHTTPRequestHandler):
    """Answers /generate with the server's ``script``: chunks, seconds to wait, or bytes to send as they are."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(200, self.server.info)

    def do_POST(self):
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null"))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Unauthorized"})
        elif isinstance(self.server.script, int):
            self._send(self.server.script, {"error": "no"})
        else:
            self.send_response(200)
            self.end_headers()
            for step in self.server.script:
                if isinstance(step, float):
                    time.sleep(step)
                    continue
                self.wfile.write(step if isinstance(step, bytes) else b"data: " + json.dumps(step).encode() + b"\n\n")
                self.wfile.flush()

    def _send(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.script, server.info, server.requests = [], {"version": "0.5.23"}, []
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server, key: str | None = TOKEN, first=None) -> Answer:
    async def run():
        async with Client(f"http://127.0.0.1:{server.server_port}/", key) as client:
            if first:
                await first(client)
            return await client.generate([5, 6, 7], temperature=0.5, max_new_tokens=9)

    return asyncio.run(run())


def test_an_answer_has_text_counts_and_arrival_times(server):
    spec = {"spec_verify_ct": 2, "spec_correct_drafts_histogram": [1, 0, 1]}
    server.script = [
        chunk("a", 1),
        0.2,
        chunk("a b c d", 4),
        chunk("a b c d e", 5, "stop", **spec),
        b"data: [DONE]\n\n",
    ]
    answer = ask(server)
    request = {"input_ids": [5, 6, 7], "sampling_params": {"temperature": 0.5, "max_new_tokens": 9}, "stream": True}
    assert server.requests == [request]
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("a b c d e", 3, 5)
    assert (answer.verifications, answer.histogram, answer.stopped) == (2, (1, 0, 1), True)
    assert [tokens for _, tokens in answer.arrivals] == [1, 4, 5]
    gap = answer.arrivals[1][0] - answer.arrivals[0][0]
    assert gap > 0.15, "the server waited in between"
    assert answer.inter_token_latencies[:3] == [gap / 3] * 3, "divided among the three tokens of the chunk"
    assert len(answer.inter_token_latencies) == 4
    assert answer.time_to_first_token + sum(answer.inter_token_latencies) == pytest.approx(answer.latency)


def test_the_histogram_of_an_older_server_is_read(server):
    server.script = [chunk("a", 1, "length", spec_accept_histogram=[3, 4])]
    answer = ask(server)
    assert (answer.histogram, answer.stopped, answer.verifications) == ((3, 4), False, 0)


@pytest.mark.parametrize("setting", ["incremental_streaming_output", "stream_output"])
def test_incremental_chunks_are_joined(server, setting):
    server.info = {"version": "0.5.23", setting: True}
    server.script = [chunk("a", 1), chunk(" b", 2), chunk(" c", 3, "stop")]
    assert ask(server, first=Client.server_info).text == "a b c"


def test_a_wrong_token_is_refused(server):
    server.script = [chunk("a", 1, "stop")]
    for wrong in (None, "another"):
        with pytest.raises(Unauthorized, match=r"refuses the token \(HTTP 401\); set the variable SGLANG_API_KEY"):
            ask(server, wrong)


@pytest.mark.parametrize(
    ("script", "error", "match"),
    [
        (400, Refused, "HTTP 400"),
        ([{"error": {"message": "longer than the context"}}], Refused, "longer than the context"),
        ([chunk("a", 1)], Unreachable, "broke off"),
        ([chunk("a", 1), chunk("a b", 2, "abort")], Unreachable, "broke off"),
        ([aborted(400, "exceeds the pool")], Refused, "exceeds the pool"),
        ([aborted(500, "went wrong")], Unreachable, r"broke off \(went wrong\)"),
        ([], Unreachable, "broke off"),
        ([b"data: {\n\n"], Unreachable, "not SGLang"),
        ([{"other": 1}], Unreachable, "not SGLang"),
    ],
)
def test_errors_and_truncated_answers_are_raised(server, script, error, match):
    server.script = script
    with pytest.raises(error, match=match):
        ask(server)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://", "ftp://127.0.0.1"])
def test_an_unreachable_server_is_an_error(url):
    async def run():
        async with Client(url) as client:
            await client.server_info()

    with pytest.raises(Unreachable) as caught:
        asyncio.run(run())
    assert str(caught.value).startswith(f"{url.rstrip('/')}: cannot be reached")


def test_a_server_that_is_not_sglang_is_refused(server):
    server.info = [1]
    with pytest.raises(Exception, match="expected its url"):
        ask(server, first=Client.server_info)
