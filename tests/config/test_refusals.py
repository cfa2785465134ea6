"""Refused command lines: one line that names the key, the finding and the remedy."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from nemo_speculative.config.app import explain, run_program, to_job
from nemo_speculative.config.groups import CONF
from nemo_speculative.utils.errors import UserError
from tests import programs

REPOSITORY = CONF.parent


def refused(*overrides: str, root: str = "train_eagle3", config_dir: Path = CONF) -> str:
    """The line that a user would read for these overrides."""
    arguments = [*overrides, "output_dir=out"] if root.startswith("train") else list(overrides)
    with (
        initialize_config_dir(str(config_dir), version_base="1.3"),
        pytest.raises(Exception) as caught,
    ):
        to_job(compose(root, overrides=arguments))
    message = str(caught.value) if isinstance(caught.value, UserError) else explain(caught.value, arguments)
    assert "\n" not in message
    return message


UNKNOWN = [
    ("trainer.max_step=5", "trainer.max_step=5: unknown key 'max_step'; did you mean 'max_steps'?"),
    ("draft.init_from_target.heads=true", "unknown key 'heads'; did you mean 'head'?"),
    ("modle.path=x", "modle.path=x: unknown key 'modle'; did you mean 'model'?"),
    ("trainer.zzz=5", "trainer.zzz=5: unknown key 'zzz'; known here: max_steps, epochs,"),
    ("data.repository=x", "data.repository=x: unknown key 'repository'; known here: path,"),
    ("model={layers: 1}", "unknown key 'layers'"),
    ("+trainer.max_step=5", "trainer.max_step: unknown key 'max_step'; did you mean 'max_steps'?"),
    ("+sed=5", "sed: unknown key 'sed'; did you mean 'seed'?"),
    ("hydra.rum=1", "hydra.rum=1: unknown key 'rum'; a setting of Hydra's own"),
]


@pytest.mark.parametrize(("override", "expected"), UNKNOWN)
def test_an_unknown_key_is_named_with_the_known_keys(override, expected):
    message = refused(override)
    assert expected in message
    assert "_target_" not in message


WRONG_TYPE = [
    ("trainer.max_steps=abc", "'abc'", "Integer"),
    ("trainer.max_steps=1.5", "1.5", "Integer"),
    ("optimizer.lr=fast", "'fast'", "Float"),
    ("optimizer.betas=[a,b]", "'a'", "Float"),
    ("optimizer.betas=1", "int", "list"),
    ("draft.aux_layers=3", "int", "list"),
    ("plan=maybe", "'maybe'", "bool"),
    ("seed=null", "seed", "Optional"),
    ("trainer.dtype=fp8", "'fp8'", "[float32, bfloat16]"),
    ("data.answers=mine", "'mine'", "[given, target]"),
    ("resume=always", "'always'", "[never, auto]"),
    ("draft.mask_convention=ours", "'ours'", "[serving, official, automodel]"),
    ("optimizer.decay_type=step", "'step'", "[constant, linear, cosine, sqrt]"),
]


@pytest.mark.parametrize(("override", "value", "expected"), WRONG_TYPE)
def test_a_wrong_type_names_the_override_the_value_and_the_expectation(override, value, expected):
    message = refused(override)
    assert message.startswith(f"{override}: ")
    assert value in message
    assert expected in message


WRONG_VALUE = [
    ("model.num_layers=5", "model.num_layers is 5: the embedded target needs at least 7"),
    ("draft.ttt_steps=0", "draft.ttt_steps is 0: it must be greater than 0"),
    ("draft.vocab_size=-1", "draft.vocab_size is -1: expected a number above 0, a coverage such as"),
    ("draft.vocab_size=many", "draft.vocab_size is 'many': expected a number above 0, a coverage such as"),
    ("draft.vocab_size=true", "draft.vocab_size is True: expected a number above 0, a coverage such as"),
    ("draft.vocab_size=1.5", "draft.vocab_size is 1.5: expected a number above 0, a coverage such as"),
    (
        "draft.aux_layers=[1,3,1]",
        "draft.aux_layers is [1, 3, 1]: expected distinct layers in ascending order, e.g. [1, 3, 4]",
    ),
    ("draft.aux_layers=[]", "draft.aux_layers is []: expected distinct layers in ascending order, e.g. [1, 3, 4]"),
    ("data.held_out_share=1", "data.held_out_share is 1.0: expected a number in [0, 1)"),
    ("data.held_out_share=-0.1", "data.held_out_share is -0.1: expected a number in [0, 1)"),
    ("data.packed_length=0", "data.packed_length is 0: it must be greater than 0"),
    ("optimizer.lr=0", "optimizer.lr is 0.0: it must be greater than 0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0: expected a number in [0, inf)"),
    ("optimizer.warmup_ratio=2", "optimizer.warmup_ratio is 2.0: expected a number in [0, 1]"),
    ("optimizer.decay_ratio=-1", "optimizer.decay_ratio is -1.0: expected a number in [0, 1]"),
    ("trainer.max_steps=0", "trainer.max_steps is 0: it must be greater than 0"),
    ("trainer.epochs=nan", "trainer.epochs is nan: it must be greater than 0"),
    ("trainer.keep_checkpoints=0", "trainer.keep_checkpoints is 0: it must be greater than 0"),
    ("exporter.topk=0", "exporter.topk is 0: it must be greater than 0"),
    (
        "exporter.num_draft_tokens=3",
        "exporter.num_draft_tokens is 3: with exporter.num_steps=5 and exporter.topk=1, expected num_steps + 1 = 6",
    ),
    ("evaluation.ngram=0", "evaluation.ngram is 0: it must be greater than 0"),
]


@pytest.mark.parametrize(("override", "expected"), WRONG_VALUE)
def test_a_value_out_of_range(override, expected):
    assert refused(override).startswith(expected)


@pytest.mark.parametrize("size", [1, 0, -2])
def test_tensor_parallelism_needs_several_ranks(size):
    message = refused("backend=hf_tp", f"backend.tp_size={size}", "data.answers=given")
    assert message.startswith(f"backend.tp_size is {size}: expected -1, or at least 2; backend=hf keeps")


@pytest.mark.parametrize("backend", ["hf_fsdp2", "hf_tp"])
def test_a_distributed_target_generates_no_answers(backend):
    assert "data.answers=target needs backend=hf" in refused(f"backend={backend}", "data.answers=target")


@pytest.mark.parametrize("decay", ["1", "1.5"])
def test_depths_are_not_sampled_without_a_decay(decay):
    message = refused("draft.depth_sampling=geometric", f"draft.step_decay={decay}")
    assert message.startswith(f"draft.depth_sampling is geometric and draft.step_decay is {float(decay)}: ")
    assert "set draft.step_decay below 1" in message


def test_a_negative_weight_of_an_eagle1_loss():
    assert refused("draft.ploss_w=-1", root="train_eagle1") == "draft.ploss_w is -1.0: expected a number in [0, inf)"


MISSING = [
    (["model=local"], "model.path is not set: give it on the command line, model.path=…"),
    (["model=local", "model.path=x", "data=jsonl"], "data.path is not set: give it on the command line, data.path=…"),
    (["seed=???"], "seed is not set: give it on the command line, seed=…"),
]


@pytest.mark.parametrize(("overrides", "expected"), MISSING)
def test_a_missing_key_is_named(overrides, expected):
    assert refused(*overrides) == expected


def test_an_unknown_option_of_a_group_lists_the_options():
    message = refused("model=nosuch")
    assert "model/nosuch" in message
    assert all(option in message for option in ("llama31_8b", "local", "tiny"))


@pytest.mark.parametrize("value", ["5", "null", "nosuch"])
def test_a_group_given_a_value_instead_of_an_option(value):
    message = refused(f"trainer={value}")
    assert "trainer" in message
    assert value in message
    assert "default" in message


def test_a_group_given_a_value_names_the_group_that_is_wrong():
    assert refused("data=tiny", "trainer=5", "logger=none") == "trainer=5: expected one of default"


NO_GROUP = [
    ("evaluate", ["draft=eagle3"], "draft=eagle3: this recipe has no group 'draft'; leave it out; --help"),
    ("evaluate", ["evaluation=default", "data=tiny"], "data=tiny: this recipe has no group 'data'; leave it out;"),
    ("train_eagle3", ["form=sglang"], "form=sglang: this recipe has no group 'form'; leave it out;"),
    ("train_eagle1", ["loss=kl"], "loss=kl: this recipe has no group 'loss'; leave it out;"),
    ("train_eagle3", ["loss@x=kl"], "loss@x=kl: this recipe has no group 'loss@x'; did you mean 'loss'?"),
]


@pytest.mark.parametrize(("root", "overrides", "expected"), NO_GROUP)
def test_a_group_that_the_recipe_does_not_have(root, overrides, expected):
    message = refused(*overrides, root=root)
    assert message.startswith(expected)
    assert "defaults list" not in message
    assert "append" not in message


def test_the_longer_of_two_matching_overrides_is_named():
    assert refused("seed=1", "model.seed=1x").startswith("model.seed=1x: ")


@pytest.mark.parametrize(
    ("override", "expected"),
    [("seed=${nosuch}", "nosuch"), ("seed=${trainer.epochs}", "${trainer.epochs}"), ("seed=${seed}", "Recursive")],
)
def test_an_unresolvable_reference_names_the_key(override, expected):
    message = refused(override)
    assert message.startswith("seed: ")
    assert expected in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_steps: abc", "trainer.max_steps: In 'trainer/wrong'"),
        ("max_step: 3", "trainer.max_step: unknown key 'max_step'; did you mean 'max_steps'?"),
    ],
)
def test_an_error_in_a_users_own_file_names_the_key(tmp_path, line, expected):
    for file in CONF.rglob("*.yaml"):
        copy = tmp_path / file.relative_to(CONF)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    (tmp_path / "trainer/wrong.yaml").write_text(f"defaults:\n  - /schema/trainer: default\n  - _self_\n{line}\n")
    assert refused("trainer=wrong", config_dir=tmp_path).startswith(expected)


def test_each_job_of_a_multirun_writes_to_a_directory_of_its_own(monkeypatch):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train_eagle3", overrides=["output_dir=out"])
    running = SimpleNamespace(mode=RunMode.MULTIRUN, job=SimpleNamespace(num=3))
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: running))
    assert to_job(config).output_dir == "out/3"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("data.path: two\n  lines"), 1, "error: data.path: two lines\n"),
        (
            KeyboardInterrupt(),
            130,
            "error: interrupted; start again with the same command (a training with resume=auto)\n",
        ),
        (ValueError("Config group override must be a string or a list. Got int"), 1, None),
    ],
)
def test_a_program_ends_with_one_line(error, code, line, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "trainer=5"])

    def program():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_program(program)
    printed = capsys.readouterr().err
    assert caught.value.code == code
    assert printed.count("\n") == 1
    assert printed == (line or "error: trainer=5: expected one of default\n")


def test_an_internal_error_has_its_traceback():
    def program():
        raise ValueError("a defect of the program")

    with pytest.raises(ValueError, match="a defect of the program"):
        run_program(program)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.max_step=5"], "trainer.max_step=5: unknown key 'max_step'; did you mean 'max_steps'?"),
        (["trainer.max_steps=abc"], "trainer.max_steps=abc: Value 'abc' of type 'str' could not be converted"),
        (["exporter.num_draft_tokens=3"], "exporter.num_draft_tokens is 3: with exporter.num_steps=5"),
        (["model=local"], "model.path is not set: give it on the command line, model.path=…"),
        (["draft.num_steps=3"], "draft.num_steps=3: this key is now draft.ttt_steps"),
        (["model=nosuch"], "In 'train_eagle3': Could not find 'model/nosuch'; Available options"),
    ],
)
def test_the_recipe_prints_one_line_and_exits_with_1(tmp_path, overrides, expected):
    command = [str(REPOSITORY / "recipes/train_eagle3.py"), *overrides, f"output_dir={tmp_path}/out"]
    environment = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = programs.run_program(*command, environment=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a refused command line creates no files"
