import json
import signal
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nemo_speculative.config.schema import EndpointConfig
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data import endpoint
from nemo_speculative.generate_data.endpoint import Chat
from nemo_speculative.generate_data.rollout import Request
from nemo_speculative.generate_data.run import generate_data, require_success, summary_table
from nemo_speculative.utils import network
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.http import LoadBalancer
from tests.generate_data.conftest import conversation, read, write
from tests.generate_data.fake_server import answer_to


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_BACKOFF", 0.02)


def answers_of(outcome):
    return read(outcome.directory / "answers.jsonl")


def check(records, target, limit=12):
    """Every turn's ids are the server's answer to the conversation rendered up to it."""
    for record in records:
        messages, expected = [], []
        for message in record["conversations"]:
            if message["role"] == "assistant":
                prompt = target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
                ids = answer_to(prompt["input_ids"], limit)
                assert message["content"] == target.tokenizer.decode(ids, skip_special_tokens=True)
                expected += ids
            messages.append(message)
        got = [i for row in record["rows"] for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
        assert got == expected


def manifest_of(outcome):
    return json.loads((outcome.directory / "manifest.json").read_text())


@pytest.mark.parametrize("kind", ["sglang", "completions"])
def test_ids_are_requested_from_servers_that_return_them(kind, serve, endpoint_job, target):
    outcome = generate_data(endpoint_job(serve(kind)))
    assert (outcome.answered, outcome.text_only) == (12, 0)
    check(answers_of(outcome), target)
    manifest = manifest_of(outcome)
    assert manifest["target"] == "the-target"
    assert manifest["protocol"] == kind
    assert manifest["max_length"] == 200, "the server's context is shorter than the target's own"


def test_answers_of_a_text_only_server_have_no_rows(serve, endpoint_job):
    outcome = generate_data(endpoint_job(serve("chat")))
    records = answers_of(outcome)
    assert manifest_of(outcome)["protocol"] == "chat"
    assert not any("rows" in record for record in records)
    assert [m["content"] for m in records[2]["conversations"][1::2]] == ["answer 1", "answer 3", "answer 5"]
    assert "12 conversations as text only" in summary_table(outcome)


def test_requests_contain_the_sampling_settings(serve, endpoint_job, tmp_path):
    log = tmp_path / "log"
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_new_tokens": 9}
    generate_data(endpoint_job(serve("sglang", log=str(log)), **settings))
    requests = [body["sampling_params"] for path, body in map(json.loads, log.read_text().splitlines())]
    seeds = [params.pop("sampling_seed") for params in requests]
    assert len(set(seeds)) == len(requests) == 24, "a seed of its own for every turn"
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_new_tokens": 9, "stop_token_ids": [1]}
    assert all(params == expected for params in requests)


def test_requests_are_balanced_over_the_servers(serve, endpoint_job, tmp_path, target):
    logs = [tmp_path / "a", tmp_path / "b"]
    urls = [serve("sglang", log=str(log), FAKE="slow:0.02") for log in logs]
    outcome = generate_data(endpoint_job(*urls, concurrency=12))  # each alone has room for all
    check(answers_of(outcome), target)
    requests = [len(log.read_text().splitlines()) for log in logs]
    assert sum(requests) == 24 and min(requests) >= 6


def test_no_answer_is_lost_when_a_server_dies(serve, endpoint_job, target):
    urls = [serve("sglang", FAKE="die_at:4"), serve("sglang", FAKE="slow:0.02")]
    outcome = generate_data(endpoint_job(*urls))
    assert outcome.answered == 12 and serve.processes[0].wait(10) == 3
    check(answers_of(outcome), target)


def test_a_restarted_server_is_used_again(serve, endpoint_job, target):
    port = network.free_port()
    url = serve("sglang", port=port, FAKE="slow:0.05")

    def replace():
        time.sleep(0.4)
        serve.processes[0].send_signal(signal.SIGKILL)
        serve.processes[0].wait()
        serve("sglang", port=port)

    replaced = threading.Thread(target=replace)
    replaced.start()
    outcome = generate_data(endpoint_job(url, concurrency=1))
    replaced.join()
    check(answers_of(outcome), target)
    assert outcome.answered == 12 and len(serve.processes) == 2


def test_a_server_restarted_with_another_model_is_refused(serve, endpoint_job):
    port = network.free_port()
    url = serve("sglang", port=port, FAKE="die_at:5")

    def replace():
        serve.processes[0].wait()
        serve("sglang", "another", port=port)

    replaced = threading.Thread(target=replace)
    replaced.start()
    with pytest.raises(UserError, match=r"serves another \(sglang.*\), where the-target \(sglang.*\) answered"):
        generate_data(endpoint_job(url, concurrency=1))
    replaced.join()


def test_the_loss_of_all_servers_is_one_line_and_the_run_resumes(serve, endpoint_job, target, tmp_path):
    port = network.free_port()
    url = serve("sglang", port=port, FAKE="die_at:7")
    with pytest.raises(UserError, match="no server has answered for 1 seconds") as caught:
        generate_data(endpoint_job(url, concurrency=1, give_up_after=1.0))
    assert "\n" not in str(caught.value)
    part = tmp_path / "out" / "0-end"
    num_stored = len(read(part / "answers.jsonl"))
    assert num_stored > 0 and read(part / "left_out.jsonl") == [], "a request that no server accepted did not fail"
    serve("sglang", port=port)
    outcome = generate_data(endpoint_job(url))
    assert outcome.answered == 12
    check(answers_of(outcome), target)


def test_no_reachable_server_is_one_line(endpoint_job):
    with pytest.raises(UserError, match=r"engine.urls: no server answers \(http://127.0.0.1"):
        generate_data(endpoint_job(f"http://127.0.0.1:{network.free_port()}"))


@pytest.mark.parametrize(
    ("fake", "reason"), [("garbage", "the response is not a completion"), ("status:500", "HTTP 500")]
)
def test_failed_requests_are_recorded_and_retried_by_the_next_run(fake, reason, serve, endpoint_job, tmp_path, target):
    failing = tmp_path / "trouble"
    failing.touch()
    url = serve("sglang", FAKE=fake, FAKE_WHILE=str(failing))
    short = {"attempts": 2, "range": "0:3", "concurrency": 3, "give_up_after": 60.0}
    outcome = generate_data(endpoint_job(url, **short))
    assert (outcome.answered, outcome.failed.total(), outcome.total) == (0, 3, 3)
    (left, *_) = read(outcome.directory / "left_out.jsonl")
    assert left["outcome"] == "failed" and left["reason"].startswith(reason) and left["attempts"] == 2
    with pytest.raises(UserError, match="3 of 3 lines failed"):
        require_success(outcome)
    failing.unlink()
    outcome = generate_data(endpoint_job(url, **short))
    assert (outcome.answered, outcome.failed.total()) == (3, 0)
    assert read(outcome.directory / "left_out.jsonl") == []
    check(answers_of(outcome), target)


def test_attempts_add_up_over_the_runs(serve, endpoint_job):
    url = serve("sglang", FAKE="status:500")
    for runs in (1, 2):
        outcome = generate_data(endpoint_job(url, attempts=1, range="0:1"))
        (left,) = read(outcome.directory / "left_out.jsonl")
        assert left["attempts"] == runs


def test_the_run_waits_for_a_busy_server(serve, endpoint_job, tmp_path):
    busy = tmp_path / "busy"
    busy.touch()
    url = serve("sglang", FAKE="status:429", FAKE_WHILE=str(busy))
    threading.Timer(1.0, busy.unlink).start()
    outcome = generate_data(endpoint_job(url, attempts=1))
    assert (outcome.answered, outcome.failed.total()) == (12, 0), "a rejected request does not count as an attempt"


def test_a_refused_request_fails_at_once_and_alone(serve, endpoint_job, tmp_path):
    rows = [{"id": "bad", "input_ids": [0, 77, 5], "loss_mask": [0, 0, 1]}, conversation("good", "hello")]
    file = write(tmp_path / "rows.jsonl", rows)
    outcome = generate_data(endpoint_job(serve("sglang", FAKE="refuse"), path=str(file)))
    assert (outcome.answered, dict(outcome.failed)) == (1, {"refused with HTTP 400": 1})


def test_a_request_to_a_hanging_server_times_out(serve, endpoint_job, tmp_path):
    urls = [serve("sglang", FAKE="slow:30"), serve("sglang")]
    outcome = generate_data(endpoint_job(*urls, timeout=0.5, concurrency=1, range="0:4", attempts=5))
    assert outcome.answered == 4


def test_the_token_is_sent_and_not_written(serve, endpoint_job, monkeypatch, tmp_path, capfd):
    url = serve("sglang", FAKE="token:s3cret")
    with pytest.raises(UserError, match="refuses the token"):
        generate_data(endpoint_job(url))
    for name in ("OPENAI_API_KEY", "SGLANG_API_KEY"):
        monkeypatch.setenv(name, "s3cret")
        assert generate_data(endpoint_job(url, output=str(tmp_path / name))).answered == 12
        monkeypatch.delenv(name)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 6 and not any(b"s3cret" in file.read_bytes() for file in written)
    assert "s3cret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("kind", "fake"),
    [("sglang", "get:502"), ("sglang", "get:429"), ("completions", "status:500"), ("completions", "drop")],
)
def test_the_route_of_a_failing_server_is_detected_later(kind, fake, serve, endpoint_job, tmp_path, target):
    failing = tmp_path / "trouble"
    failing.touch()
    url = serve(kind, FAKE=fake, FAKE_WHILE=str(failing))
    threading.Timer(0.5, failing.unlink).start()
    outcome = generate_data(endpoint_job(url))
    assert (outcome.answered, manifest_of(outcome)["protocol"]) == (12, kind)
    check(answers_of(outcome), target)


def test_lasting_failure_at_the_start_is_one_line(serve, endpoint_job):
    with pytest.raises(UserError, match=r"no server answers \(http://127.0.0.1:\d+: HTTP 502\)"):
        generate_data(endpoint_job(serve("sglang", FAKE="get:502"), give_up_after=0.3))


@pytest.mark.parametrize("fake", ["status:500", "drop", "get:502"])
def test_the_run_waits_for_a_restarted_server_that_fails(fake, serve, endpoint_job, tmp_path, target):
    port, failing = network.free_port(), tmp_path / "trouble"
    failing.touch()
    url = serve("completions", port=port, FAKE="die_at:7")

    def replace():
        serve.processes[0].wait()
        serve("completions", port=port, FAKE=fake, FAKE_WHILE=str(failing))
        time.sleep(0.5)
        failing.unlink()

    replaced = threading.Thread(target=replace)
    replaced.start()
    outcome = generate_data(endpoint_job(url, concurrency=1))
    replaced.join()
    assert (outcome.answered, outcome.text_only) == (12, 0)
    check(answers_of(outcome), target)


def test_an_invalid_response_does_not_count_as_a_server_failure(serve, endpoint_job, monkeypatch):
    monkeypatch.setattr(LoadBalancer, "failed", lambda *_: pytest.fail("a healthy server counted as failed"))
    outcome = generate_data(endpoint_job(serve("sglang", FAKE="garbage"), range="0:2"))
    assert outcome.failed.total() == 2


@pytest.mark.parametrize("reasoning", ["Keep", "Split"])
def test_truncated_reasoning_is_an_answer(reasoning, serve, endpoint_job):
    outcome = generate_data(endpoint_job(serve("chat", FAKE="cut:hm, hm"), reasoning=reasoning, range="0:1"))
    (record,) = answers_of(outcome)
    answer = {"role": "assistant", "content": "", "reasoning_content": "hm, hm"}
    assert (record["conversations"][-1], record["finish"]) == (answer, ["length"])


@pytest.mark.parametrize(("fake", "reasoning"), [("cut:", "Keep"), ("cut:hm", "Drop")])
def test_an_answer_truncated_before_any_content_is_skipped(fake, reasoning, serve, endpoint_job):
    outcome = generate_data(endpoint_job(serve("chat", FAKE=fake), reasoning=reasoning, range="0:1"))
    assert dict(outcome.skipped) == {"an answer was cut before it had any content": 1} and not outcome.failed


def test_another_model_of_the_same_name_is_refused(serve, endpoint_job):
    urls = [serve("sglang", FAKE_PATH=path) for path in ("/a", "/b")]
    generate_data(endpoint_job(urls[0], range="0:2"))
    with pytest.raises(UserError, match="started with model_path=/a, and it is /b now"):
        generate_data(endpoint_job(urls[1], range="0:2"))
    with pytest.raises(UserError, match=r"loaded from /.*the same model has to answer all"):
        generate_data(endpoint_job(*urls, range="2:3"))


def test_another_model_between_two_runs_is_refused(serve, endpoint_job):
    generate_data(endpoint_job(serve("sglang"), range="0:2"))
    with pytest.raises(UserError, match="started with target=the-target, and it is another now"):
        generate_data(endpoint_job(serve("sglang", "another"), range="0:2"))
    with pytest.raises(UserError, match="started with protocol=sglang, and it is completions now"):
        generate_data(endpoint_job(serve("completions"), range="0:2"))


def test_servers_of_different_models_are_refused(serve, endpoint_job):
    with pytest.raises(UserError, match="the same model has to answer all"):
        generate_data(endpoint_job(serve("sglang"), serve("sglang", "another")))


def test_a_model_that_a_server_lacks_is_refused(serve, endpoint_job):
    with pytest.raises(
        UserError, match=r"has the models the-target; name one of them with engine.model \(it is mine\)"
    ):
        generate_data(endpoint_job(serve("sglang"), model="mine"))


@pytest.mark.parametrize("status", [200, 404])
def test_a_server_that_lists_no_model_is_named_by_its_path(status, serve, endpoint_job):
    outcome = generate_data(endpoint_job(serve("sglang", FAKE=f"no_models:{status}", FAKE_PATH="/a"), range="0:1"))
    assert (outcome.answered, manifest_of(outcome)["target"]) == (1, "/a")


def test_a_server_of_another_kind_is_refused(endpoint_job, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match="/v1/models names no model"):
            generate_data(endpoint_job(f"http://127.0.0.1:{server.server_address[1]}"))
    finally:
        server.shutdown()
        server.server_close()


def test_urls_are_checked():
    with pytest.raises(UserError, match=r"engine.urls is empty"):
        EndpointConfig(urls=[])
    with pytest.raises(UserError, match=r"engine.urls holds 'here'"):
        EndpointConfig(urls=["here"])


def test_tool_call_arguments_are_text_for_the_server_and_objects_in_the_data():
    protocol = Chat("m", Sampling(), [], 300)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    message = protocol.read({"choices": [{"message": answer, "finish_reason": "tool_calls"}]}).message
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    sent = protocol.body(Request([], 5, 0, [message]))["messages"]
    assert sent == [answer]
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}, "the stored message differs from the sent one"
