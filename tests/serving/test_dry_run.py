"""The dry run, with a small parser in place of SGLang's."""

import sys

import pytest

from nemo_speculative.serve_sglang import main

pytestmark = pytest.mark.usefixtures("fake_sglang")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    return main(["--dry-run", *arguments]), *capsys.readouterr()


def test_the_parsed_settings_are_shown(capsys, run_dir, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("started")

    monkeypatch.setattr("subprocess.Popen", forbidden)
    code, out, err = run(capsys, "--draft", str(run_dir), "--num-steps", "3", "--topk", "2")
    assert (code, err) == (0, "")
    understood = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert understood["speculative_algorithm"] == "EAGLE3"
    assert understood["speculative_num_steps"] == "3" and understood["speculative_num_draft_tokens"] == "7"
    assert understood["speculative_draft_model_path"].startswith(str(run_dir))


def test_a_flag_unknown_to_sglang_is_refused_in_one_line(capsys, run_dir):
    code, out, err = run(capsys, "--draft", str(run_dir), "--", "--nonsense", "4")
    assert (code, out) == (2, "")
    assert err == ("error: SGLang refuses the command: sglang serve: error: unrecognized arguments: --nonsense 4\n")


def test_a_flag_that_overrides_another_by_abbreviation_is_refused(capsys, run_dir):
    """argparse completes abbreviations, and the last occurrence wins."""
    code, _, err = run(capsys, "--draft", str(run_dir), "--", "--speculative-num-st", "9")
    assert code == 2 and "reads speculative_num_steps as 9, and 5 was meant" in err


def test_an_sglang_that_cannot_be_imported_is_refused_in_one_line(capsys, run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang.srt.server_args", None)
    code, _, err = run(capsys, "--draft", str(run_dir))
    assert code == 2 and err.startswith("error: SGLang cannot be imported (") and err.count("\n") == 1
