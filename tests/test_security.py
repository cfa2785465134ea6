"""What no module may do, and where servers listen unless they are told otherwise."""

import ast
from pathlib import Path

import pytest

from nemo_speculative.config.schema import ServeTargetJob
from nemo_speculative.serve_sglang import main

PACKAGE = Path(__file__).parents[1] / "nemo_speculative"
UNPICKLING = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
    "recv_object_list", "loads", "Unpickler",
}  # fmt: skip
"""Collectives of objects unpickle what peers send."""
TEXT = {"json", "orjson", "yaml", "tomllib"}
"""Whose ``loads`` makes no objects but its own."""


def unsafe_calls(file):
    """Calls that unpickle, and loads of torch that might."""
    for call in ast.walk(ast.parse(file.read_text())):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        of = getattr(getattr(call.func, "value", None), "id", "")
        safely = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords)
        if (
            (name in UNPICKLING and of not in TEXT)
            or (of == "pickle")
            or (of == "torch" and name == "load" and not safely)
        ):
            yield f"{file.relative_to(PACKAGE)}:{call.lineno} {of}.{name}"


def test_nothing_of_ours_unpickles_what_others_send():
    assert [line for file in sorted(PACKAGE.rglob("*.py")) for line in unsafe_calls(file)] == []


@pytest.mark.parametrize(
    "line",
    ["dist.all_gather_object(a, b)", "pickle.load(f)", "torch.load(f)", "loads(x)", "torch.load(f, weights_only=0)"],
)
def test_what_unpickles_is_seen(line, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "module.py").write_text(f"{line}\njson.loads(x)\ntorch.load(f, weights_only=True)\n")
    assert len(list(unsafe_calls(tmp_path / "module.py"))) == 1


def test_servers_listen_on_the_loopback_unless_told(capsys):
    assert ServeTargetJob.__dataclass_fields__["host"].default == "127.0.0.1"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "address to listen on (default: 127.0.0.1)" in " ".join(capsys.readouterr().out.split())
