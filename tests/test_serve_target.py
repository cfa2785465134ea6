"""Errors of the target server's command line: one line and a nonzero exit code."""

import importlib.util
import socket
import sys

import pytest

from nemo_speculative import serve_target
from nemo_speculative.targets.remote.protocol import TOKEN_VARIABLE


@pytest.fixture
def refused(target_dir, monkeypatch, capsys):
    """Runs the program with a command line and returns its one-line error."""

    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["serve_target", "model=local", f"model.path={target_dir}", *overrides])
        with pytest.raises(SystemExit) as end:
            serve_target.main()
        assert end.value.code
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["host=no-such-host.invalid"], "host=no-such-host.invalid port=31000: cannot listen there"),
        (["host=192.0.2.1", "port=0"], "host=192.0.2.1 port=0: cannot listen there"),
        (["port=70000"], "port is 70000: expected a number in [0, 65535]"),
        (["queue=0"], "queue is 0: it must be greater than 0"),
        (["drain=-1"], "drain is -1: it must be greater than 0"),
        (["aux_layers=[7]", "port=0"], "aux_layers holds 7"),
        (["model.path=/no/model", "port=0"], "/no/model does not exist"),
        (["backend=remote", "port=0"], "backend=remote: a target server is one process"),
        (["backend=features", "backend.directory=x", "port=0"], "backend=features: a target server is one process"),
        (["backend=hf_fsdp2", "port=0"], "backend=hf_fsdp2: a target server is one process"),
        (["backend=hf_tp", "port=0"], "backend=hf_tp: a target server is one process"),
        (["trainer.max_steps=3"], "trainer.max_steps=3"),
        (["quue=3"], "did you mean"),
    ],
)
def test_invalid_command_lines_end_in_one_line(refused, overrides, message):
    assert message in refused(*overrides)


def test_a_port_in_use_is_one_line_before_the_target_is_loaded(refused):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        line = refused(f"port={port}", "model.path=/no/model")
    assert f"host=127.0.0.1 port={port}: cannot listen there (Address already in use)" in line


def test_an_empty_token_is_rejected(refused, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, " ")
    assert f"{TOKEN_VARIABLE} is empty" in refused("port=0")


@pytest.mark.parametrize("token", ["two words", "two\nlines", "gehëim"])
def test_a_token_that_no_header_can_hold_is_rejected(refused, monkeypatch, token):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    line = refused("port=0")
    assert f"{TOKEN_VARIABLE} is empty, or has a space" in line and token not in line


def test_a_missing_package_is_named(refused, monkeypatch):
    result = importlib.util.find_spec
    monkeypatch.setattr(serve_target, "find_spec", lambda name: None if name == "uvicorn" else result(name))
    assert "needs uvicorn, which is not installed" in refused("port=0")
