import json
import signal
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nemo_speculative.config.schema import EndpointConfig
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data import endpoint
from nemo_speculative.generate_data.protocols import Chat
from nemo_speculative.generate_data.rollout import Request
from nemo_speculative.generate_data.run import generate_data, require_success, summary_table
from nemo_speculative.utils import network
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import LoadBalancer
from tests.generate_data.conftest import conversation, read, write
from tests.generate_data.fake_server import answer_to


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_BACKOFF", 0.02)


def answers_of(outcome):
    return read(outcome.directory / "answers.jsonl")


def check(records, target, limit=12):
    """Every turn's ids are the server's answer to the conversation rendered until then."""
    for record in records:
        said, expected = [], []
        for message in record["conversations"]:
            if message["role"] == "assistant":
                prompt = target.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)
                ids = answer_to(prompt["input_ids"], limit)
                assert message["content"] == target.tokenizer.decode(ids, skip_special_tokens=True)
                expected += ids
            said.append(message)
        got = [i for row in record["rows"] for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
        assert got == expected


def manifest_of(outcome):
    return json.loads((outcome.directory / "manifest.json").read_text())


@pytest.mark.parametrize("kind", ["sglang", "completions", "logprobs"])
def test_servers_that_tell_ids_are_asked_for_them(kind, serve, asking, target):
    outcome = generate_data(asking(serve(kind)))
    assert (outcome.answered, outcome.text_only) == (12, 0)
    check(answers_of(outcome), target)
    manifest = manifest_of(outcome)
    assert manifest["target"] == "the-target"
    assert manifest["protocol"] == {"logprobs": "completions-logprobs"}.get(kind, kind)
    assert manifest["max_length"] == 200, "the server's context is shorter than the target's own"


def test_a_server_that_tells_text_alone_gives_conversations_without_rows(serve, asking):
    outcome = generate_data(asking(serve("chat")))
    records = answers_of(outcome)
    assert manifest_of(outcome)["protocol"] == "chat"
    assert not any("rows" in record for record in records)
    assert [m["content"] for m in records[2]["conversations"][1::2]] == ["answer 1", "answer 3", "answer 5"]
    assert "12 conversations as text only" in summary_table(outcome)


def test_what_is_sent_says_how_to_sample(serve, asking, tmp_path):
    log = tmp_path / "log"
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_new_tokens": 9}
    generate_data(asking(serve("sglang", log=str(log)), **settings))
    asked = [body["sampling_params"] for path, body in map(json.loads, log.read_text().splitlines())]
    seeds = [params.pop("sampling_seed") for params in asked]
    assert len(set(seeds)) == len(asked) == 24, "a seed of its own for every turn"
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_new_tokens": 9, "stop_token_ids": [1]}
    assert all(params == expected for params in asked)


def test_requests_are_spread_over_the_servers(serve, asking, tmp_path, target):
    logs = [tmp_path / "a", tmp_path / "b"]
    urls = [serve("sglang", log=str(log), FAKE="slow:0.02") for log in logs]
    outcome = generate_data(asking(*urls, concurrency=12))  # each alone has room for all
    check(answers_of(outcome), target)
    asked = [len(log.read_text().splitlines()) for log in logs]
    assert sum(asked) == 24 and min(asked) >= 6


def test_a_server_that_dies_in_the_middle_loses_nothing(serve, asking, target):
    urls = [serve("sglang", FAKE="die_at:4"), serve("sglang", FAKE="slow:0.02")]
    outcome = generate_data(asking(*urls))
    assert outcome.answered == 12 and serve.processes[0].wait(10) == 3
    check(answers_of(outcome), target)


def test_a_server_that_is_killed_and_comes_back_is_asked_again(serve, asking, target):
    port = network.free_port()
    url = serve("sglang", port=port, FAKE="slow:0.05")

    def replace():
        time.sleep(0.4)
        serve.processes[0].send_signal(signal.SIGKILL)
        serve.processes[0].wait()
        serve("sglang", port=port)

    replaced = threading.Thread(target=replace)
    replaced.start()
    outcome = generate_data(asking(url, concurrency=1))
    replaced.join()
    check(answers_of(outcome), target)
    assert outcome.answered == 12 and len(serve.processes) == 2


def test_another_model_that_comes_back_is_refused_by_name(serve, asking):
    port = network.free_port()
    url = serve("sglang", port=port, FAKE="die_at:5")

    def replace():
        serve.processes[0].wait()
        serve("sglang", "another", port=port)

    replaced = threading.Thread(target=replace)
    replaced.start()
    with pytest.raises(UserError, match=r"serves another \(sglang.*\), where the-target \(sglang.*\) answered"):
        generate_data(asking(url, concurrency=1))
    replaced.join()


def test_when_all_are_dead_the_run_ends_in_one_line_and_is_gone_on_with(serve, asking, target, tmp_path):
    port = network.free_port()
    url = serve("sglang", port=port, FAKE="die_at:7")
    with pytest.raises(UserError, match="no server has answered for 1 seconds") as caught:
        generate_data(asking(url, concurrency=1, give_up_after=1.0))
    assert "\n" not in str(caught.value)
    part = tmp_path / "out" / "0-end"
    kept = len(read(part / "answers.jsonl"))
    assert kept > 0 and read(part / "left_out.jsonl") == [], "a request that nobody took did not fail"
    serve("sglang", port=port)
    outcome = generate_data(asking(url))
    assert outcome.answered == 12
    check(answers_of(outcome), target)


def test_no_server_at_all_is_one_line(asking):
    with pytest.raises(UserError, match=r"engine.urls: no server answers \(http://127.0.0.1"):
        generate_data(asking(f"http://127.0.0.1:{network.free_port()}"))


@pytest.mark.parametrize(
    ("fake", "reason"), [("garbage", "the response is not a completion"), ("status:500", "HTTP 500")]
)
def test_what_fails_is_recorded_and_tried_again_by_the_next_run(fake, reason, serve, asking, tmp_path, target):
    trouble = tmp_path / "trouble"
    trouble.touch()
    url = serve("sglang", FAKE=fake, FAKE_WHILE=str(trouble))
    short = {"attempts": 2, "range": "0:3", "concurrency": 3, "give_up_after": 60.0}
    outcome = generate_data(asking(url, **short))
    assert (outcome.answered, outcome.failed.total(), outcome.total) == (0, 3, 3)
    (left, *_) = read(outcome.directory / "left_out.jsonl")
    assert left["outcome"] == "failed" and left["reason"].startswith(reason) and left["attempts"] == 2
    with pytest.raises(UserError, match="3 of 3 lines failed"):
        require_success(outcome)
    trouble.unlink()
    outcome = generate_data(asking(url, **short))
    assert (outcome.answered, outcome.failed.total()) == (3, 0)
    assert read(outcome.directory / "left_out.jsonl") == []
    check(answers_of(outcome), target)


def test_attempts_add_up_over_the_runs(serve, asking):
    url = serve("sglang", FAKE="status:500")
    for runs in (1, 2):
        outcome = generate_data(asking(url, attempts=1, range="0:1"))
        (left,) = read(outcome.directory / "left_out.jsonl")
        assert left["attempts"] == runs


def test_a_busy_server_is_waited_for(serve, asking, tmp_path):
    busy = tmp_path / "busy"
    busy.touch()
    url = serve("sglang", FAKE="status:429", FAKE_WHILE=str(busy))
    threading.Timer(1.0, busy.unlink).start()
    outcome = generate_data(asking(url, attempts=1))
    assert (outcome.answered, outcome.failed.total()) == (12, 0), "no attempt was made of what was not taken"


def test_a_request_that_is_refused_fails_at_once_and_alone(serve, asking, tmp_path):
    rows = [{"id": "bad", "input_ids": [0, 77, 5], "loss_mask": [0, 0, 1]}, conversation("good", "hello")]
    file = write(tmp_path / "rows.jsonl", rows)
    outcome = generate_data(asking(serve("sglang", FAKE="refuse"), path=str(file)))
    assert (outcome.answered, dict(outcome.failed)) == (1, {"refused with HTTP 400": 1})


def test_a_server_that_hangs_is_given_up(serve, asking, tmp_path):
    urls = [serve("sglang", FAKE="slow:30"), serve("sglang")]
    outcome = generate_data(asking(*urls, timeout=0.5, concurrency=1, range="0:4", attempts=5))
    assert outcome.answered == 4


def test_the_token_is_sent_and_written_nowhere(serve, asking, monkeypatch, tmp_path, capfd):
    url = serve("sglang", FAKE="token:s3cret")
    with pytest.raises(UserError, match="refuses the token"):
        generate_data(asking(url))
    for name in ("OPENAI_API_KEY", "SGLANG_API_KEY"):
        monkeypatch.setenv(name, "s3cret")
        assert generate_data(asking(url, output=str(tmp_path / name))).answered == 12
        monkeypatch.delenv(name)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 6 and not any(b"s3cret" in file.read_bytes() for file in written)
    assert "s3cret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("kind", "fake"),
    [("sglang", "get:502"), ("sglang", "get:429"), ("completions", "status:500"), ("completions", "drop")],
)
def test_a_server_in_trouble_is_asked_again_what_it_is(kind, fake, serve, asking, tmp_path, target):
    trouble = tmp_path / "trouble"
    trouble.touch()
    url = serve(kind, FAKE=fake, FAKE_WHILE=str(trouble))
    threading.Timer(0.5, trouble.unlink).start()
    outcome = generate_data(asking(url))
    assert (outcome.answered, manifest_of(outcome)["protocol"]) == (12, kind)
    check(answers_of(outcome), target)


def test_trouble_at_the_start_that_does_not_end_is_one_line(serve, asking):
    with pytest.raises(UserError, match=r"no server answers \(http://127.0.0.1:\d+: HTTP 502\)"):
        generate_data(asking(serve("sglang", FAKE="get:502"), give_up_after=0.3))


@pytest.mark.parametrize("fake", ["status:500", "drop", "get:502"])
def test_a_server_that_comes_back_in_trouble_is_waited_for(fake, serve, asking, tmp_path, target):
    port, trouble = network.free_port(), tmp_path / "trouble"
    trouble.touch()
    url = serve("completions", port=port, FAKE="die_at:7")

    def replace():
        serve.processes[0].wait()
        serve("completions", port=port, FAKE=fake, FAKE_WHILE=str(trouble))
        time.sleep(0.5)
        trouble.unlink()

    replaced = threading.Thread(target=replace)
    replaced.start()
    outcome = generate_data(asking(url, concurrency=1))
    replaced.join()
    assert (outcome.answered, outcome.text_only) == (12, 0)
    check(answers_of(outcome), target)


def test_what_is_no_answer_is_no_trouble_of_the_server(serve, asking, monkeypatch):
    monkeypatch.setattr(LoadBalancer, "failed", lambda *_: pytest.fail("a server that is well was left alone"))
    outcome = generate_data(asking(serve("sglang", FAKE="garbage"), range="0:2"))
    assert outcome.failed.total() == 2


@pytest.mark.parametrize("reasoning", ["Keep", "Split"])
def test_reasoning_that_was_cut_is_an_answer(reasoning, serve, asking):
    outcome = generate_data(asking(serve("chat", FAKE="cut:hm, hm"), reasoning=reasoning, range="0:1"))
    (record,) = answers_of(outcome)
    said = {"role": "assistant", "content": "", "reasoning_content": "hm, hm"}
    assert (record["conversations"][-1], record["finish"]) == (said, ["length"])


@pytest.mark.parametrize(("fake", "reasoning"), [("cut:", "Keep"), ("cut:hm", "Drop")])
def test_an_answer_that_was_cut_before_it_said_anything_is_skipped(fake, reasoning, serve, asking):
    outcome = generate_data(asking(serve("chat", FAKE=fake), reasoning=reasoning, range="0:1"))
    assert dict(outcome.skipped) == {"an answer was cut before it had any content": 1} and not outcome.failed


def test_another_model_of_the_same_name_is_refused(serve, asking):
    urls = [serve("sglang", FAKE_PATH=path) for path in ("/a", "/b")]
    generate_data(asking(urls[0], range="0:2"))
    with pytest.raises(UserError, match="begun with model_path=/a, and it is /b now"):
        generate_data(asking(urls[1], range="0:2"))
    with pytest.raises(UserError, match=r"loaded from /.*the same model has to answer all"):
        generate_data(asking(*urls, range="2:3"))


def test_another_model_between_two_runs_is_refused(serve, asking):
    generate_data(asking(serve("sglang"), range="0:2"))
    with pytest.raises(UserError, match="begun with target=the-target, and it is another now"):
        generate_data(asking(serve("sglang", "another"), range="0:2"))
    with pytest.raises(UserError, match="begun with protocol=sglang, and it is completions now"):
        generate_data(asking(serve("completions"), range="0:2"))


def test_servers_of_different_models_are_refused(serve, asking):
    with pytest.raises(UserError, match="the same model has to answer all"):
        generate_data(asking(serve("sglang"), serve("sglang", "another")))


def test_a_model_that_a_server_has_not_is_refused(serve, asking):
    with pytest.raises(
        UserError, match=r"has the models the-target; name one of them with engine.model \(it is mine\)"
    ):
        generate_data(asking(serve("sglang"), model="mine"))


def test_what_is_no_such_server_is_refused(asking, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match="/v1/models names no model"):
            generate_data(asking(f"http://127.0.0.1:{server.server_address[1]}"))
    finally:
        server.shutdown()
        server.server_close()


def test_urls_are_checked():
    with pytest.raises(UserError, match=r"engine.urls is empty"):
        EndpointConfig(urls=[])
    with pytest.raises(UserError, match=r"engine.urls holds 'here'"):
        EndpointConfig(urls=["here"])


def test_arguments_of_calls_are_text_to_the_server_and_objects_in_the_data():
    protocol = Chat("m", Sampling(), [], 300)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    message = protocol.read({"choices": [{"message": said, "finish_reason": "tool_calls"}]}).message
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    sent = protocol.body(Request([], 5, 0, [message]))["messages"]
    assert sent == [said]
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}, "what is kept is not what is sent"
