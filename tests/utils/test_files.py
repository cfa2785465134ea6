"""Files and directories appear complete or not at all; locks are released by a kill."""

import errno
import multiprocessing
import os
import signal

import pytest

from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import (
    JobLock,
    atomic_directory,
    atomic_write,
    atomic_write_text,
    differing_keys,
    dir_lock,
    disk_full_error,
    file_sizes,
    read_manifest,
    write_manifest,
)


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "file"
    atomic_write_text(file, "old \ud800")
    with pytest.raises(KeyError), atomic_write(file) as out:
        out.write(b"new")
        raise KeyError
    assert file.read_text() == "old ?" and list(tmp_path.iterdir()) == [file]


def test_a_directory_appears_complete_or_not_at_all(tmp_path):
    directory = tmp_path / "new"
    with pytest.raises(KeyError), atomic_directory(directory) as partial:
        (partial / "a").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "left by a killed run").touch()
    with atomic_directory(directory) as partial:
        (partial / "a").touch()
        assert not directory.exists()
    assert [file.name for file in directory.iterdir()] == ["a"] and list(tmp_path.iterdir()) == [directory]


@pytest.mark.parametrize(
    ("code", "expected"), [(errno.ENOSPC, UserError), (errno.EDQUOT, UserError), (errno.EIO, OSError)]
)
def test_only_a_full_disk_becomes_a_user_error(code, expected):
    with pytest.raises(expected), disk_full_error("output: the disk is full"):
        raise OSError(code, "why")


def _hold(directory, started):
    with dir_lock(directory, "output"):
        started.set()
        signal.pause()


def test_a_held_directory_is_refused_until_its_process_is_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "d", started))
    process.start()
    assert started.wait(60)
    refused = pytest.raises(UserError, match=r"^output: another process writes into .*d; wait for it")
    with refused, dir_lock(tmp_path / "d", "output"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with dir_lock(tmp_path / "d", "output"):
        pass


def test_the_processes_of_a_job_share_a_lock_that_keeps_others_out(tmp_path):
    first = JobLock(tmp_path, "key", first=True)
    second = JobLock(tmp_path, "key", first=False)
    second.join()
    left = []
    first.leave(lambda: left.append("first"))
    with pytest.raises(UserError, match=r"^key: another process writes into"):
        JobLock(tmp_path, "key", first=True)
    second.leave(lambda: left.append("second"))
    assert left == ["second"]
    JobLock(tmp_path, "key", first=True).leave(lambda: None)


def test_a_manifest_tells_what_differs_and_whether_its_files_are_complete(tmp_path):
    (tmp_path / "rows").write_bytes(b"123")
    sizes = file_sizes(tmp_path, ["rows", "missing"])
    assert sizes == {"rows": 3}
    assert read_manifest(tmp_path / "manifest.json") is None
    write_manifest(tmp_path / "manifest.json", {"seed": 1, "name": "ü", "bytes": sizes})
    stored = read_manifest(tmp_path / "manifest.json")
    assert stored == {"seed": 1, "name": "ü", "bytes": {"rows": 3}}
    assert differing_keys(stored, {"seed": 2, "bytes": {}, "new": 0}, ignored=["bytes"]) == ["seed", "name", "new"]
    (tmp_path / "rows").write_bytes(b"12")
    assert file_sizes(tmp_path, stored["bytes"]) != stored["bytes"]


def test_a_damaged_manifest_is_an_error(tmp_path):
    for content in ("[1]", "{"):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=r"expected|Expecting"):
            read_manifest(tmp_path / "manifest.json")
