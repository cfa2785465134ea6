"""The command line of serve_sglang: the SGLang command for a checkpoint, and the refused options."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_speculative.serve_sglang import main
from nemo_speculative.serving import command
from nemo_speculative.serving.command import from_checkpoint, serve_command, sglang_command
from nemo_speculative.utils import sglang
from nemo_speculative.utils.errors import UsageError
from nemo_speculative.utils.sglang import CPU_ENGINE


@pytest.fixture
def without_sglang(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)


def printed(capsys, *argv: str) -> list[str]:
    """The words that --print-only prints for ``argv``."""
    assert main(["--print-only", *argv]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return shlex.split(out)


def refused(capsys, *argv: str) -> str:
    """The one line with which ``argv`` is refused."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def value(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1
    return words[words.index(flag) + 1]


def test_the_command_has_the_recorded_settings(capsys, run_dir, without_sglang):
    model = run_dir / "checkpoints" / "best" / "model"
    assert printed(capsys, "--draft", str(run_dir)) == [
        "python", "-m", "sglang.launch_server", "--model-path", "org/target", "--speculative-algorithm", "EAGLE3",
        "--speculative-draft-model-path", str(model), "--speculative-num-steps", "5", "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", "6", "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", "30000",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [".", "checkpoints/step_3", "checkpoints/step_3/model", "checkpoints/best"])
def test_run_step_and_model_directories_are_accepted(capsys, run_dir, model_dir, arguments):
    words = printed(capsys, "--draft", str(run_dir / arguments))
    assert Path(value(words, "--speculative-draft-model-path")).resolve() == model_dir.resolve()


def test_a_relative_path_is_printed_absolute(capsys, run_dir, monkeypatch):
    monkeypatch.chdir(run_dir.parent)
    words = printed(capsys, "--draft", run_dir.name)
    assert value(words, "--speculative-draft-model-path") == str(run_dir / "checkpoints" / "best" / "model")


def test_the_command_that_training_prints_is_the_same(capsys, model_dir):
    line = sglang_command(model_dir)
    assert shlex.split(line) == printed(capsys, "--draft", str(model_dir))
    assert f"'{model_dir}'" in line


def test_the_line_survives_a_shell(model_dir):
    line = sglang_command(model_dir).replace("-m sglang.launch_server", "-c 'import sys; print(sys.argv[1:])'", 1)
    line = line.replace(line.split()[0], shlex.quote(sys.executable), 1)
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert str(model_dir) in eval(done.stdout)


def test_options_override_recorded_settings(capsys, run_dir):
    words = printed(
        capsys, "--draft", str(run_dir), "--target", "other/target", "--algorithm", "EAGLE3", "--num-steps", "3",
        "--topk", "4", "--num-draft-tokens", "16", "--dtype", "float16", "--tp-size", "2", "--host", "0.0.0.0",
        "--port", "1234", "--trust-remote-code",
    )  # fmt: skip
    flags = {"--model-path": "other/target", "--speculative-num-steps": "3", "--speculative-eagle-topk": "4",
             "--speculative-num-draft-tokens": "16", "--dtype": "float16", "--tp-size": "2", "--host": "0.0.0.0",
             "--port": "1234"}  # fmt: skip
    assert {flag: value(words, flag) for flag in flags} == flags
    assert "--trust-remote-code" in words


@pytest.mark.parametrize(("arguments", "tokens"), [(["--num-steps", "2"], "3"), (["--topk", "4"], "21")])
def test_the_number_of_draft_tokens_is_derived_from_steps_and_topk(capsys, run_dir, arguments, tokens):
    assert value(printed(capsys, "--draft", str(run_dir), *arguments), "--speculative-num-draft-tokens") == tokens


def test_words_after_two_dashes_are_passed_to_sglang(capsys, run_dir):
    extra = ["--mem-fraction-static", "0.7", "--", "--json", '{"a b": 1}']
    assert printed(capsys, "--draft", str(run_dir), "--", *extra)[-5:] == extra


def test_an_existing_target_directory_is_printed_absolute(capsys, run_dir, target, monkeypatch):
    monkeypatch.chdir(target.parent)
    words = printed(capsys, "--draft", str(run_dir), "--target", target.name)
    assert value(words, "--model-path") == str(target)


@pytest.mark.parametrize(
    ("version", "graphs"), [("0.5.9", "--cuda-graph-max-bs"), ("0.5.13.post1", "--cuda-graph-max-bs"),
                            ("0.5.14", "--cuda-graph-max-bs-decode"), ("0.5.23", "--cuda-graph-max-bs-decode")]
)  # fmt: skip
def test_a_flag_has_the_name_that_the_version_knows(capsys, run_dir, version, graphs):
    words = printed(capsys, "--draft", str(run_dir), "--sglang-version", version, "--cuda-graph-max-bs", "16")
    assert value(words, graphs) == "16"


def test_rejection_sampling_needs_a_version_that_has_it(capsys, run_dir):
    arguments = ["--draft", str(run_dir), "--rejection-sampling"]
    assert "--speculative-use-rejection-sampling" in printed(capsys, *arguments, "--sglang-version", "0.5.14")
    assert "--rejection-sampling takes SGLang 0.5.14 or later" in refused(
        capsys, *arguments, "--sglang-version", "0.5.13"
    )
    assert "add --topk 1" in refused(capsys, *arguments, "--topk", "2")
    assert "--device cpu" in refused(capsys, *arguments, "--device", "cpu")


def test_rejection_sampling_needs_the_whole_vocabulary(capsys, run_dir, write_draft):
    write_draft(draft_vocab_size=12)
    error = refused(capsys, "--draft", str(run_dir), "--rejection-sampling")
    assert "12 of the target's 16 tokens" in error and "draft.vocab_size=full" in error
    write_draft(draft_vocab_size=None)  # the target's own head
    assert "--speculative-use-rejection-sampling" in printed(capsys, "--draft", str(run_dir), "--rejection-sampling")


@pytest.mark.parametrize(
    ("changed", "version", "message"),
    [
        ({"fc_norm": True}, "0.5.13", "draft.fc_norm=true cannot be served by SGLang 0.5.13; 0.5.14 and later can"),
        ({"norm_before_fc": True}, "0.5.14", "draft.norm_before_fc=true cannot be served by SGLang 0.5.14"),
        ({"num_layers": 2}, "0.5.9", "draft.num_layers=2 cannot be served by SGLang 0.5.9"),
    ],
)
def test_a_draft_that_the_version_cannot_serve_is_refused(capsys, run_dir, write_draft, changed, version, message):
    write_draft(**changed)
    error = refused(capsys, "--draft", str(run_dir), "--print-only", "--sglang-version", version)
    assert message in error and "set --sglang-version" in error
    printed(capsys, "--draft", str(run_dir), "--sglang-version", "0.5.17")


@pytest.mark.parametrize(
    ("version", "message"),
    [("0.5.8", "SGLang 0.5.8 is not supported, only 0.5.9 to 0.5.23"), ("0.5.24", "0.5.24 is not supported"),
     ("1.0.0", "1.0.0 is not supported"), ("latest", "--sglang-version is 'latest'")],
)  # fmt: skip
def test_an_unsupported_version_is_refused(capsys, run_dir, version, message):
    assert message in refused(capsys, "--draft", str(run_dir), "--print-only", "--sglang-version", version)


def test_the_installed_version_is_the_default(capsys, run_dir, fake_sglang, monkeypatch):
    monkeypatch.setattr(sglang, "version", lambda name: "0.5.9")
    words = printed(capsys, "--draft", str(run_dir), "--cuda-graph-max-bs", "16")
    assert value(words, "--cuda-graph-max-bs") == "16"
    monkeypatch.setattr(sglang, "version", lambda name: "0.5.8")
    assert "SGLang 0.5.8 is not supported" in refused(capsys, "--draft", str(run_dir))


def test_the_command_that_training_prints_does_not_depend_on_the_installed_version(model_dir, monkeypatch):
    line = sglang_command(model_dir)
    monkeypatch.setattr(sglang, "version", lambda name: "0.5.8")
    assert sglang_command(model_dir) == line


def test_another_version_than_the_installed_one_is_only_printed(capsys, run_dir, fake_sglang):
    arguments = ["--draft", str(run_dir), "--sglang-version", "0.5.14"]
    assert "0.5.23 is installed here" in refused(capsys, *arguments)
    assert "0.5.23 is installed here" in refused(capsys, *arguments, "--dry-run")
    printed(capsys, *arguments)


def test_the_cpu_line_sets_its_environment_variables(capsys, run_dir, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/some where")
    words = printed(capsys, "--draft", str(run_dir), "--device", "cpu")
    assignments = dict(word.split("=", 1) for word in words[: words.index("-m") - 1])
    assert assignments == {**sglang.CPU_ENVIRONMENT, "PYTHONPATH": f"{CPU_ENGINE}{os.pathsep}/some where"}
    assert value(words, "--device") == "cpu"
    assert value(words, "--dtype") == "float32"


def test_print_only_touches_nothing(capsys, run_dir, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("touched")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    monkeypatch.setattr("tempfile.mkstemp", forbidden)
    before = {path: path.lstat().st_mtime_ns for path in run_dir.rglob("*")}
    printed(capsys, "--draft", str(run_dir), "--target", "/no/such/target")
    assert {path: path.lstat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize("action", ["--print-only", "--help"])
def test_printing_imports_no_heavy_library(model_dir, target, action):
    script = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'torchtitan', 'sglang'): sys.modules[name] = None\n"
        "from nemo_speculative.serve_sglang import main\n"
        f"arguments = ['--draft', {str(model_dir)!r}, '--target', {str(target)!r}, {action!r}]\n"
        "try:\n"
        "    code = main(arguments)\n"
        "except SystemExit as exit:\n"
        "    code = exit.code\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'numpy', 'httpx'} & sys.modules.keys()\n"
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-steps", "0"], "--num-steps is 0"),
        (["--num-steps", "-2"], "--num-steps is -2"),
        (["--topk", "0"], "--topk is 0"),
        (["--num-draft-tokens", "5"], "--num-steps + 1 = 6"),
        (["--num-steps", "2", "--num-draft-tokens", "6"], "--num-steps + 1 = 3"),
        (["--num-steps", "1", "--topk", "4", "--num-draft-tokens", "6"], "has 5 to 5 nodes"),
        (["--algorithm", "EAGLE"], "--algorithm is EAGLE"),
        (["--tp-size", "0"], "--tp-size is 0"),
        (["--port", "70000"], "--port is 70000"),
        (["--target", ""], "--target is empty"),
        (["--num-steps", "many"], "--num-steps"),
        (["--dtype", "int8"], "int8"),
        (["--cuda-graph-max-bs", "0"], "--cuda-graph-max-bs is 0"),
        (["--cuda-graph-max-bs", "4", "--device", "cpu"], "--device cpu"),
        (["--device", "cpu", "--sglang-version", "0.5.22", "--print-only"], "--device cpu takes SGLang 0.5.23"),
        (["--print-only", "--dry-run"], "not allowed with"),
        (["--print-only", "--prompt", "hello"], "not allowed with"),
        (["--max-new-tokens", "4"], "together with --prompt"),
        (["--prompt", "hello", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--", "--cuda-graph-max-bs", "4"], "--cuda-graph-max-bs after --"),
        (["--unknown"], "--unknown"),
        (["--", "--port", "4"], "--port after --"),
        (["--", "--speculative-algorithm=EAGLE"], "--speculative-algorithm after --"),
    ],
)
def test_a_contradiction_is_refused(capsys, run_dir, arguments, message):
    assert message in refused(capsys, "--draft", str(run_dir), *arguments)


def test_a_missing_option_is_refused(capsys):
    assert "--draft" in refused(capsys)


def test_a_missing_path_is_refused(capsys, tmp_path):
    assert f"{tmp_path}/no such run does not exist" in refused(capsys, "--draft", f"{tmp_path}/no such run")


def test_a_directory_without_a_checkpoint_is_refused(capsys, tmp_path):
    assert f"{tmp_path} holds no checkpoint" in refused(capsys, "--draft", str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("nemo_speculative"),
        lambda config: config.update(nemo_speculative=[1]),
        lambda config: config["nemo_speculative"].pop("target"),
        lambda config: config["nemo_speculative"].update(target=None),
        lambda config: config["nemo_speculative"].update(speculative=None),
        lambda config: config["nemo_speculative"]["speculative"].update(num_steps="five"),
        lambda config: config["nemo_speculative"]["speculative"].update(num_draft_tokens=9),
        lambda config: config.update(architectures=["LlamaForCausalLMEagle"]),
        lambda config: config.update(eagle_config="yes"),
        lambda config: config.update(rope_parameters=None),
        lambda config: config.update(draft_vocab_size="all"),
    ],
)
def test_a_malformed_configuration_is_refused(capsys, model_dir, edit_config, change):
    edit_config(change)
    assert f"{model_dir}/config.json" in refused(capsys, "--draft", str(model_dir), "--print-only")


def test_a_configuration_that_is_not_json_is_refused(capsys, model_dir):
    (model_dir / "config.json").write_text('{"architectures": [')
    assert f"{model_dir}/config.json" in refused(capsys, "--draft", str(model_dir), "--print-only")


def test_a_missing_sglang_is_refused_with_how_to_install_it(capsys, run_dir, without_sglang):
    assert "requirements-sglang.txt" in refused(capsys, "--draft", str(run_dir))


def test_a_missing_target_directory_is_refused(capsys, run_dir, fake_sglang):
    assert "/no/such/target" in refused(capsys, "--draft", str(run_dir), "--target", "/no/such/target")


def test_a_busy_port_is_refused(capsys, run_dir, fake_sglang):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        assert f"--port {port}" in refused(capsys, "--draft", str(run_dir), "--port", port)


def test_the_program_ends_with_code_2_and_one_line(tmp_path):
    program = [sys.executable, "-m", "nemo_speculative.serve_sglang", "--draft", str(tmp_path / "gone")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_inconsistent_options_cannot_be_constructed(model_dir):
    with pytest.raises(UsageError, match="--num-draft-tokens is 3"):
        from_checkpoint(model_dir, {"num_draft_tokens": 3})


def test_tp_size_1_is_not_written(model_dir):
    assert "--tp-size" not in serve_command(from_checkpoint(model_dir, {"tp_size": 1}))


def test_weights_that_are_cut_off_are_refused_before_anything_starts(capsys, model_dir):
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "model.safetensors: cut off" in refused(capsys, "--draft", str(model_dir), "--print-only")


def test_a_missing_accelerator_is_refused_before_sglang_starts(capsys, run_dir, fake_sglang, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert "add --device cpu" in refused(capsys, "--draft", str(run_dir))
