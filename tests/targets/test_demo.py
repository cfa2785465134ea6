"""The embedded target with a small configuration and few steps."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_speculative.config.schema import TinyModelConfig
from nemo_speculative.data import stdlib
from nemo_speculative.data.chat_template import tokenize
from nemo_speculative.targets import demo

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def small(tmp_path, **changed):
    values = {"hidden_size": 32, "head_dim": 16, "intermediate_size": 48, "num_layers": 7, "vocab_size": 400}
    return TinyModelConfig(cache_dir=str(tmp_path), steps=8, rows_per_step=2, row_tokens=64, **(values | changed))


def test_it_is_trained_once_deterministically_and_is_an_ordinary_directory(tmp_path, capsys, monkeypatch):
    real = stdlib.stdlib_conversations
    monkeypatch.setattr(demo, "stdlib_conversations", lambda held_out: real(held_out)[:120])
    monkeypatch.setattr(demo, "directory_of", lambda config: tmp_path / config.cache_dir / "made")
    first = demo.prepare_tiny(small(tmp_path / "a"))
    message = capsys.readouterr().out
    assert "held-out loss" in message and message.count("Q: ") == 3 and message.count("A: ") == 3
    second = demo.prepare_tiny(small(tmp_path / "b"))
    one, two = (AutoModelForCausalLM.from_pretrained(d).state_dict() for d in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)
    capsys.readouterr()
    assert demo.prepare_tiny(small(tmp_path / "a")) == first
    assert "made before" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(first)
    row = tokenize(tokenizer, real(held_out=True)[0], {tokenizer.eos_token_id})
    assert row.loss_mask[-1] and not row.loss_mask[0]


def test_the_cache_key_covers_all_settings_that_affect_it(tmp_path):
    base = demo.directory_of(small(tmp_path))
    assert demo.directory_of(small(tmp_path)) == base
    assert demo.directory_of(small(tmp_path, hidden_size=64)) != base
    assert demo.directory_of(small(tmp_path, seed=1)) != base


def test_the_cache_key_of_the_default_target_is_stable(monkeypatch):
    """Targets that earlier versions trained are found."""
    monkeypatch.setattr(demo.sys, "version_info", (3, 11))
    assert demo.directory_of(TinyModelConfig()).name == "tiny-730f520c9590"


def test_an_interrupted_save_leaves_no_target(tmp_path, monkeypatch):
    class Model:
        def save_pretrained(self, path):
            raise OSError("No space left on device")

    real = stdlib.stdlib_conversations
    monkeypatch.setattr(demo, "stdlib_conversations", lambda held_out: real(held_out)[:60])
    monkeypatch.setattr(demo, "train_tiny", lambda config, rows: Model())
    monkeypatch.setattr(demo, "_print_quality", lambda *_: None)
    with pytest.raises(OSError, match="No space"):
        demo.prepare_tiny(small(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_two_processes_make_it_once(tmp_path):
    """The second waits for the first, and finds what it made."""
    program = tmp_path / "make.py"
    program.write_text(MAKE)
    processes = [
        subprocess.Popen(
            [sys.executable, program, tmp_path / "cache"], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
        )
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("made before" in text for text in printed) == [False, True]


MAKE = """
import sys
from nemo_speculative.data import stdlib
from nemo_speculative.targets import demo
from tests.targets.test_demo import small
conversations = stdlib.stdlib_conversations
demo.stdlib_conversations = lambda held_out: conversations(held_out)[:60]
demo.prepare_tiny(small(sys.argv[1]))
"""


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_it_is_trained_in_bfloat16_where_the_cpu_has_units_for_it(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, unit: True})
    real, seen = demo.LlamaForCausalLM.forward, []

    def forward(self, *given, **named):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(self, *given, **named)

    monkeypatch.setattr(demo.LlamaForCausalLM, "forward", forward)
    config = dataclasses.replace(small(tmp_path), steps=1)
    demo.train_tiny(config, torch.zeros(2, 8, dtype=torch.long))
    assert seen == [unit is not None]
