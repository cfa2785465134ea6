"""The command line of the training-step benchmark."""

import sys

import pytest

from benchmarks.training_step import __main__ as program
from benchmarks.training_step import cli
from benchmarks.training_step.case import SIZES

PEERS = ["--peers-python", sys.executable]


@pytest.fixture(autouse=True)
def without_peers(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "PEERS_PYTHON", tmp_path / "none" / "python")


def names(*argv):
    (comparison,) = cli.parse(argv)
    return [chosen.text for chosen in comparison.chosen], comparison.references


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--size", "XL"], "--size"),
        (["--sise", "S"], "--sise"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--warmup", "0"], "--warmup is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--supervised", "0"], "--supervised is 0.0"),
        (["--supervised", "1.5"], "--supervised is 1.5"),
        (["--supervised", "0.5", "--lengths", "sharegpt"], "leave it out"),
        (["--draft", "eagle1", "--steps", "7"], "one step"),
        (["--implementations", "ours,other"], "'other' is unknown"),
        (["--implementations", "ours:fast"], "ours has no variant 'fast'; it has geometric"),
        (["--implementations", "ours,ours"], "twice"),
        (["--implementations", "textbook", "--draft", "eagle1"], "textbook has no eagle1; it has eagle3"),
        (["--implementations", "textbook", "--lengths", "sharegpt"], "not compared with --lengths sharegpt"),
        (["--implementations", "ours:geometric", "--draft", "eagle1"], "needs more than one step"),
        (["--implementations", "automodel:packed", *PEERS], "packed needs --lengths sharegpt"),
        (["--implementations", "automodel:medium", "--dtype", "bfloat16", *PEERS], "medium needs --dtype float32"),
        (["--implementations", "automodel"], "needs the peers' environment"),
        (["--table", "short"], "needs the peers' environment"),
        (["--peers-python", "/nowhere/python"], "--peers-python: /nowhere/python does not exist"),
        (["--reference", "automodel"], "--reference: 'automodel' is not compared"),
    ],
    ids=" ".join,
)
def test_an_impossible_command_is_a_one_line_error(argv, message, capsys):
    assert program.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert err.count("\n") == 1 and err.startswith("error: ")


def test_without_peers_ours_is_compared_with_the_textbook():
    assert names() == (["ours", "ours:geometric", "target", "textbook"], ["textbook"])
    assert names("--draft", "eagle1") == (["ours", "target"], ["ours"])


def test_with_peers_automodel_is_the_reference_with_its_own_and_with_our_setting():
    implementations, references = names(*PEERS)
    assert references == ["automodel", "automodel:medium"]
    assert {"specforge", "speculators", "textbook"} <= set(implementations)
    assert names("--dtype", "bfloat16", *PEERS)[1] == ["automodel"]
    packed = ["automodel:packed", "automodel:packed:medium"]
    assert names("--lengths", "sharegpt", *PEERS)[1] == ["automodel", "automodel:medium", *packed]


@pytest.mark.parametrize("table", cli.TABLES)
def test_every_comparison_of_a_table_is_valid(table):
    comparisons = cli.parse(["--table", table, "--threads", "1", *PEERS])
    assert len(comparisons) == len(cli.TABLES[table])
    assert {c.case.threads for c in comparisons} == {1}
    assert {c.case.draft for c in comparisons} == {"eagle3", "eagle1"}
    assert all(any(c.case.size is size for c in comparisons) for size in SIZES.values())


def test_a_failed_worker_is_one_line_and_the_next_comparison_still_runs(monkeypatch, capsys):
    started = []

    def compare(comparison):
        started.append(comparison)
        if len(started) == 1:
            raise program.UserError("ours: its process ended with status 1: out of memory")
        return "figures"

    monkeypatch.setattr(program, "compare", compare)
    monkeypatch.setitem(cli.TABLES, "short", ["--steps 7", "--steps 4"])
    assert program.main(["--table", "short"]) == 1
    out, err = capsys.readouterr()
    assert out == "figures\n\n"
    assert err == "error: ours: its process ended with status 1: out of memory\n"
