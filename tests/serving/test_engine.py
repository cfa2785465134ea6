"""Answers to single prompts from the engine, with a small program in place of SGLang."""

import pytest

from nemo_speculative.serve_sglang import main

pytestmark = pytest.mark.usefixtures("fake_sglang")


@pytest.fixture
def ask(capsys, run_dir, tmp_path):
    """Runs serve_sglang on a CPU; returns exit code, standard output, standard error and the log."""

    def run(*arguments: str) -> tuple[int, str, str, str]:
        log = tmp_path / "log"
        code = main(["--draft", str(run_dir), "--device", "cpu", "--log", str(log), *arguments])
        out, err = capsys.readouterr()
        return code, out, err, log.read_text() if log.exists() else ""

    return run


def test_prompts_are_answered_in_order(ask):
    code, out, err, log = ask("--prompt", "four", "--prompt", "fives", "--max-new-tokens", "10")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == [
        "", "> four", "answer to [4] at 0", "[10 tokens in 4 verifications, acceptance length 2.50]",
        "", "> fives", "answer to [5] at 0", "[10 tokens in 4 verifications, acceptance length 2.50]",
    ]  # fmt: skip
    assert "speculative_num_steps=5" in log and log.endswith("shut down\n")


def test_an_answer_from_the_prefill_alone_has_no_acceptance_length(ask):
    assert "[1 tokens in 0 verifications]" in ask("--prompt", "four", "--max-new-tokens", "1")[1]


def test_an_engine_that_kills_its_process_shows_its_last_lines(ask, monkeypatch):
    monkeypatch.setenv("FAKE_SGLANG", "die")
    code, _, err, _ = ask("--prompt", "four")
    *log, last = err.splitlines()
    assert code == 1
    assert log[-1] == "CUDA error: out of memory"
    assert last.startswith("error: SGLang ended with code -9 before it was ready")


def test_an_engine_that_is_never_ready_is_ended(ask, monkeypatch):
    monkeypatch.setenv("FAKE_SGLANG", "hang")
    code, _, err, _ = ask("--prompt", "four", "--timeout", "1")
    assert code == 1 and "error: SGLang was not ready after 1 s" in err


def test_an_answer_that_never_comes_ends_the_engine(ask, monkeypatch):
    monkeypatch.setenv("FAKE_SGLANG", "hang after ready")
    code, _, err, _ = ask("--prompt", "four", "--timeout", "15")
    assert code == 1 and "error: SGLang was not done with its answer after 15 s" in err


def test_a_truncated_answer_is_discarded(ask, monkeypatch):
    monkeypatch.setenv("FAKE_SGLANG", "die in an answer")
    code, _, err, _ = ask("--prompt", "four")
    assert code == 1 and "error: SGLang ended with code -9 before it was done with its answer" in err


def test_a_prompt_that_the_template_rejects_is_refused(ask):
    code, out, err, _ = ask("--prompt", "four", "--prompt", "forbidden")
    assert code == 2 and "> four" in out
    assert err == "error: --prompt: the chat template rejects this conversation: rejected by the template\n"
