"""The run directory: its contents after every step and after every crash."""

import os
import random
from pathlib import Path

import pytest

from nemo_speculative.checkpoint.run_dir import RunDirectory
from nemo_speculative.utils.errors import UserError


def save(run: RunDirectory, step: int, tau: float | None = None, keep: int = 2) -> None:
    """Writes a checkpoint as the trainer does."""
    partial = run.begin(step)
    (partial / "model").mkdir()
    (partial / "model/weights").write_text(f"weights of {step}")
    run.publish(step, tau, keep)


def prepared(root: Path, *taus: float | None, keep: int = 100) -> RunDirectory:
    """A run with checkpoints at the steps 10, 20, … and these acceptance lengths."""
    run = RunDirectory(root)
    run.prepare()
    for number, tau in enumerate(taus, start=1):
        save(run, 10 * number, tau, keep)
    return run


def link(run: RunDirectory, name: str) -> str | None:
    """The target of a link; None where it is not a link to a checkpoint."""
    path = run.checkpoints / name
    return str(path.readlink()) if path.is_symlink() and (path / "model/weights").is_file() else None


def tree(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*")) if p.is_file()}


def naive_best(taus: dict[int, float | None]) -> int | None:
    """The step of the largest measured tau, the earliest of equal ones; without any, the latest step."""
    best = None
    for step in sorted(taus):
        if taus[step] is not None and (best is None or taus[step] > taus[best]):
            best = step
    return best if best is not None else max(taus, default=None)


BEST = [
    ([], None),
    ([None], 10),
    ([None, None, None], 30),
    ([1.0, 2.0, 3.0], 30),
    ([3.0, 2.0, 1.0], 10),
    ([1.0, 2.5, 2.5, 2.0], 20),
    ([None, 1.1, None], 20),
    ([2.0, None], 10),
    ([0.0, None], 10),
]


@pytest.mark.parametrize(("taus", "best"), BEST)
def test_the_best_is_the_largest_tau_and_the_earliest_of_equals(tmp_path, taus, best):
    run = prepared(tmp_path / "run", *taus)
    assert run.best() == best == naive_best({10 * n: tau for n, tau in enumerate(taus, start=1)})
    assert [run.tau(step) for step in run.steps()] == taus


def test_a_new_directory_is_empty(tmp_path):
    run = RunDirectory(tmp_path / "a/b/run")
    assert (run.steps(), run.best()) == ([], None)
    run.prepare()
    assert (run.steps(), run.best()) == ([], None)
    assert list(run.checkpoints.iterdir()) == []


def test_a_published_checkpoint_is_complete_and_linked(tmp_path):
    run = prepared(tmp_path / "run", 1.5)
    assert tree(run.checkpoints / "step_10") == {"model/weights": "weights of 10", "acceptance.json": '{"tau": 1.5}\n'}
    assert (link(run, "latest"), link(run, "best")) == ("step_10", "step_10")
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["best", "latest", "step_10"]
    assert (run.checkpoints / "step_10/state").is_dir()


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_rotation_keeps_the_latest_and_the_best(tmp_path, keep, seed):
    """Compares with a naive list after each of twelve checkpoints."""
    rng = random.Random(seed)
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    expected: dict[int, float | None] = {}
    for step in range(5, 65, 5):
        expected[step] = rng.choice([None, 1.0, 1.5, 2.0, 2.5])
        save(run, step, expected[step], keep)
        best = naive_best(expected)
        expected = {s: tau for s, tau in expected.items() if s in sorted(expected)[-keep:] or s == best}
        assert run.steps() == sorted(expected)
        assert (link(run, "latest"), link(run, "best")) == (f"step_{step}", f"step_{best}")
        leftovers = {p.name for p in run.checkpoints.iterdir()} - {f"step_{s}" for s in expected}
        assert leftovers == {"latest", "best"}


def test_steps_are_ordered_as_numbers(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    for step in (1000, 90, 9):
        save(run, step, keep=10)
    assert run.steps() == [9, 90, 1000]
    assert link(run, "latest") == "step_1000"


def test_other_files_are_not_steps(tmp_path):
    run = prepared(tmp_path / "run", 1.0)
    (run.checkpoints / "step_99").write_text("a file")
    for name in ("step_5x", "step_", "old_step_7", ".step_8.partial", "notes"):
        (run.checkpoints / name).mkdir()
    assert run.steps() == [10]


def test_a_step_published_again_is_replaced(tmp_path):
    run = prepared(tmp_path / "run", 1.0, 2.0)
    partial = run.begin(20)
    (partial / "model").mkdir()
    (partial / "model/weights").write_text("anew")
    run.publish(20, 0.5, keep=2)
    assert tree(run.path(20))["model/weights"] == "anew"
    assert (run.tau(20), link(run, "best"), link(run, "latest")) == (0.5, "step_10", "step_20")


def test_beginning_again_starts_empty(tmp_path):
    run = prepared(tmp_path / "run")
    (run.begin(10) / "half").write_text("of a first try")
    assert tree(run.begin(10)) == {}
    assert run.steps() == []


def test_an_abandoned_checkpoint_leaves_the_others_as_they_were(tmp_path):
    run = prepared(tmp_path / "run", 1.0)
    before = tree(run.root)
    (run.begin(20) / "half").write_text("…")
    run.abandon(20)
    run.abandon(30)  # never begun
    assert tree(run.root) == before
    assert run.steps() == [10]


def crash_while_writing(run: RunDirectory) -> None:
    (run.begin(30) / "model").mkdir()


def crash_after_the_rename(run: RunDirectory) -> None:
    """Published, but the links are not updated yet."""
    partial = run.begin(30)
    (partial / "model").mkdir()
    (partial / "model/weights").write_text("weights of 30")
    (partial / "acceptance.json").write_text('{"tau": 9.0}')
    partial.rename(run.path(30))


def crash_while_linking(run: RunDirectory) -> None:
    (run.checkpoints / ".latest").symlink_to("step_20")
    (run.checkpoints / "latest").unlink()


def crash_while_removing(run: RunDirectory) -> None:
    (run.checkpoints / "step_10").rename(run.checkpoints / ".step_10.removed")
    (run.checkpoints / ".step_10.partial").mkdir()
    (run.checkpoints / ".step_10.partial.removed").mkdir()


def lost_links(run: RunDirectory) -> None:
    for name in ("latest", "best"):
        (run.checkpoints / name).unlink()


CRASHES = [
    (crash_while_writing, [10, 20], "step_20", "step_10"),
    (crash_after_the_rename, [10, 20, 30], "step_30", "step_30"),
    (crash_while_linking, [10, 20], "step_20", "step_10"),
    (crash_while_removing, [20], "step_20", "step_20"),
    (lost_links, [10, 20], "step_20", "step_10"),
]


@pytest.mark.parametrize(("crash", "steps", "latest", "best"), CRASHES)
def test_the_next_start_repairs_the_directory(tmp_path, crash, steps, latest, best):
    run = prepared(tmp_path / "run", 2.0, 1.0)
    crash(run)
    restarted = RunDirectory(run.root)
    restarted.prepare()
    assert restarted.steps() == steps
    assert (link(restarted, "latest"), link(restarted, "best")) == (latest, best)
    names = {p.name for p in restarted.checkpoints.iterdir()}
    assert names == {"latest", "best"} | {f"step_{s}" for s in steps}
    save(restarted, 40, 10.0)
    assert link(restarted, "best") == link(restarted, "latest") == "step_40"


class Killed(BaseException):
    """An exception that nothing catches."""


def dies_after(budget: list[int], original):
    """Wraps ``original``, which works until the shared budget of calls is spent."""

    def call(*args, **kwargs):
        if budget[0] == 0:
            raise Killed
        budget[0] -= 1
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("survived", range(5))
def test_a_crash_at_any_time_of_publishing_leaves_complete_checkpoints(tmp_path, monkeypatch, survived):
    """One rename publishes, two move the links, two remove older checkpoints; the crash comes before each in turn."""
    run = prepared(tmp_path / "run", 2.0, 1.0)
    budget = [survived]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", dies_after(budget, Path.rename))
        patch.setattr(os, "replace", dies_after(budget, os.replace))
        save(run, 30, 3.0, keep=1)

    restarted = RunDirectory(run.root)
    restarted.prepare()
    assert restarted.steps() == {0: [10, 20], 4: [20, 30]}.get(survived, [10, 20, 30])
    assert [tree(restarted.path(s))["model/weights"] for s in restarted.steps()] == [
        f"weights of {s}" for s in restarted.steps()
    ]
    assert link(restarted, "latest") == f"step_{max(restarted.steps())}"
    assert link(restarted, "best") == ("step_10" if survived == 0 else "step_30")
    assert not list(restarted.checkpoints.glob(".*"))


def metrics(*lines: str) -> str:
    return "".join(line + "\n" for line in lines)


LINES = ['{"step": 0, "a": 1}', '{"step": 5, "a": 2}', '{"step": 10, "a": 3}', '{"a": 4, "step": 15}']


@pytest.mark.parametrize(
    ("content", "step", "kept"),
    [
        (metrics(*LINES), 10, LINES[:3]),
        (metrics(*LINES), 9, LINES[:2]),
        (metrics(*LINES), 15, LINES),
        (metrics(*LINES), 0, LINES[:1]),
        (metrics(*LINES), -1, []),
        ("", 10, []),
        (metrics(*LINES[:2]) + LINES[2][:7], 10, LINES[:2]),
        (metrics(*LINES[:2]) + LINES[2][:-1], 100, LINES[:2]),
        (metrics(*LINES[:2]) + LINES[2], 10, LINES[:3]),
        (metrics(*LINES[:2]) + "\n", 10, LINES[:2]),
        (metrics(LINES[0]) + '{"no step": 1}\n' + metrics(LINES[1]), 10, LINES[:2]),
        # Written by a run that was resumed: steps 5 and 10 come twice.
        (metrics(*LINES[:3], *LINES[1:]), 5, [LINES[0], LINES[1], LINES[1]]),
    ],
)
def test_metrics_are_kept_until_a_step(tmp_path, content, step, kept):
    run = prepared(tmp_path / "run")
    (run.root / "metrics.jsonl").write_text(content)
    run.keep_metrics_until(step)
    assert (run.root / "metrics.jsonl").read_text() == metrics(*kept)
    assert {p.name for p in run.root.iterdir()} == {"checkpoints", "metrics.jsonl"}


def test_without_metrics_there_is_nothing_to_keep(tmp_path):
    run = prepared(tmp_path / "run")
    run.keep_metrics_until(5)
    assert not (run.root / "metrics.jsonl").exists()


def test_set_aside_loses_no_file(tmp_path):
    root = tmp_path / "run"
    before: dict[str, dict[str, str]] = {}
    for number in range(1, 4):
        run = prepared(root, 1.0 * number)
        (root / "metrics.jsonl").write_text(f"metrics of run {number}\n")
        (root / "config.yaml").write_text(f"run: {number}\n")
        expected = tmp_path / f"run.previous-{number}"
        before[expected.name] = tree(root)
        assert run.set_aside() == expected
        assert not root.exists()
    assert {p.name: tree(p) for p in tmp_path.iterdir()} == before
    assert all((tmp_path / name / "checkpoints/latest/model/weights").is_file() for name in before)


def test_set_aside_uses_a_free_number(tmp_path):
    for taken in ("run.previous-1", "run.previous-3"):
        (tmp_path / taken).mkdir()
        (tmp_path / taken / "kept").write_text(taken)
    assert prepared(tmp_path / "run", 1.0).set_aside() == tmp_path / "run.previous-2"
    assert tree(tmp_path / "run.previous-1") == {"kept": "run.previous-1"}
    assert tree(tmp_path / "run.previous-3") == {"kept": "run.previous-3"}


@pytest.mark.parametrize("make", [lambda root: None, lambda root: root.mkdir(), lambda root: prepared(root)])
def test_set_aside_does_nothing_without_a_run(tmp_path, make):
    make(tmp_path / "run")
    assert RunDirectory(tmp_path / "run").set_aside() is None
    assert not list(tmp_path.glob("*previous*"))


def test_set_aside_renames_a_run_with_metrics_only(tmp_path):
    """A run that was stopped before its first checkpoint."""
    prepared(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    assert RunDirectory(tmp_path / "run").set_aside() == tmp_path / "run.previous-1"
    assert tree(tmp_path / "run.previous-1") == {"metrics.jsonl": "{}\n"}


def test_a_directory_with_other_files_is_refused(tmp_path, monkeypatch):
    (tmp_path / "proj" / "src").mkdir(parents=True)
    (tmp_path / "proj" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"output_dir: .*proj holds other files \(src, thesis.txt\)"):
        RunDirectory(tmp_path / "proj").check_usable()
    monkeypatch.chdir(tmp_path / "proj")
    for place in (".", "..", tmp_path):
        with pytest.raises(UserError, match="is the working directory or above it"):
            RunDirectory(place).check_usable()
    with pytest.raises(UserError, match=r"output_dir: .* cannot be written, .*thesis.txt is a file"):
        RunDirectory(tmp_path / "proj" / "thesis.txt" / "run").check_usable()
    RunDirectory("src/run").check_usable()
    assert not (tmp_path / "proj" / "src" / "run").exists()


def test_metrics_without_a_checkpoint_are_renamed(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.prepare()
    assert run.set_metrics_aside() is None
    for number in (1, 2):
        (run.root / "metrics.jsonl").write_text(f"{number}\n")
        assert run.set_metrics_aside().name == f"metrics.previous-{number}.jsonl"
    assert (run.root / "metrics.previous-1.jsonl").read_text() == "1\n"
    run.check_usable()
