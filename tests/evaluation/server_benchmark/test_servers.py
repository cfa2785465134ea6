"""Details of starting servers that whole benchmarks do not cover."""

from nemo_speculative.evaluation.server_benchmark.servers import settings_digest, split, without
from nemo_speculative.serving.command import from_checkpoint, serve_command


def test_a_baseline_is_the_same_command_without_its_speculative_flags(run_dir):
    extra = ("--speculative-attention-mode", "decode", "--enable-metrics", "--speculative-some-switch")
    command = serve_command(from_checkpoint(run_dir, {"device": "cpu", "sglang_version": "0.5.23", "extra": extra}))
    common, speculative = split(command)
    assert not [word for word in common if "speculative-" in word] and "EAGLE3" not in common and "decode" not in common
    assert "--enable-metrics" in common and common[:3] == command[:3]
    assert sorted([*common, *speculative]) == sorted(command)
    assert {"--speculative-num-steps", "5", "--speculative-attention-mode", "decode"} < set(speculative)


def test_a_flag_is_removed_with_its_value():
    assert without(["--a", "1", "--port", "2", "--b"], "--port") == ["--a", "1", "--b"]


def test_the_digest_of_a_servers_settings_survives_a_restart():
    info = {"version": "0.5.23", "max_running_requests": 8, "port": 1, "startup_time": 1.5, "random_seed": 3}
    again = {**info, "port": 2, "nccl_port": 7, "startup_time": 2.5, "random_seed": 4, "internal_states": [{"load": 1}]}
    assert settings_digest(again) == settings_digest(info)
    assert settings_digest({**info, "max_running_requests": 4}) != settings_digest(info)
