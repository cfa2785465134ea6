"""``make audit`` and ``make lock`` on copies of the repository's files, one of them broken."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tools import audit, lock
from tools.requirements import AuditError, Pin, built_elsewhere, read_pins

ROOT = Path(__file__).parents[2]
FILES = ["pyproject.toml", *(file.name for file in ROOT.glob("requirements*"))]


@pytest.fixture
def project(tmp_path):
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def audited(project, monkeypatch, capsys):
    """Exit status, output and errors of an audit of ``project``, with an index that has the releases of the locks."""
    known = {**read_pins(ROOT / lock.LOCK), **read_pins(ROOT / lock.CUDA_LOCK)}
    monkeypatch.setattr(audit, "published", lambda requirements, constraint: known)
    monkeypatch.setattr(audit, "ask_pip_audit", lambda *locks: [{"name": "torch", "version": "2.13.0", "vulns": []}])

    def run():
        status = audit.audit(project)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_the_repository_passes(audited):
    status, said, errors = audited()
    assert status == 0 and not errors
    assert [line.split(":")[0] for line in said.splitlines()] == ["pins", "hashes", "installed", "vulnerabilities"]


def test_the_locks_name_no_registry():
    for name in (lock.LOCK, lock.CUDA_LOCK, lock.CPU_LOCK):
        text = (ROOT / name).read_text()
        assert "://" not in text and "index" not in text and "find-links" not in text


HTTPX = "httpx==0.28.1"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("requirements.lock", "--hash=sha256:0", "--hash=sha256:f", r"is of no file that the index has"),
        ("requirements-cuda.lock", "--hash=sha256:0", "--hash=sha256:f", r"is of no file that the index has"),
        ("requirements.lock", HTTPX, "httpx==0.28.2", "httpx==0.28.2 is not the httpx==0.28.1 of requirements.txt"),
        ("requirements.lock", f"{HTTPX} \\\n", f"{HTTPX}\n#", "httpx==0.28.1 has no sha256 hash"),
        ("requirements.lock", HTTPX, "other==1", "httpx==0.28.1 of requirements.txt is missing; make lock"),
        ("requirements.lock", HTTPX, f"other==1\n{HTTPX}", "other is not in requirements.txt"),
        ("requirements-cpu.lock", "torch==2.13.0", "torch==2.12.0", "torch==2.12.0 is not the torch==2.13.0 of req"),
        ("requirements-cpu.lock", "--hash=sha256:", "#", "torch==2.13.0 has no sha256 hash"),
        ("requirements-cuda.lock", "triton==", "tritonic==", "tritonic==.* is not what torch needs"),
        ("requirements.txt", HTTPX, "httpx>=0.28.1", "httpx>=0.28.1 is not pinned; expected httpx==version"),
        ("requirements.txt", HTTPX, "httpx", "httpx is not pinned"),
        ("requirements.txt", HTTPX, "git+https", "is no requirement|is not pinned"),
        ("requirements.txt", f"{HTTPX}\n", "", "httpx of pyproject.toml is not pinned; pin it"),
        ("requirements-peers.txt", "loguru==", "loguru>=", "requirements-peers.txt: loguru>=.* is not pinned"),
        ("pyproject.toml", '"httpx",', '"httpx", "leftpad",', "leftpad of pyproject.toml is not pinned; pin it"),
        (
            "pyproject.toml",
            '"httpx",',
            '"httpx>=1",',
            r"httpx==0.28.1 is not what pyproject.toml asks for \(httpx>=1\)",
        ),
    ],
)
def test_a_problem_is_a_one_line_error_and_an_exit_status(audited, project, file, old, new, message):
    change(project / file, old, new)
    status, _, errors = audited()
    first = errors.splitlines()[0]
    assert status == 1 and first.startswith("error: ") and re.search(message, first), errors


def test_a_missing_dependency_of_a_cuda_build_is_named(audited, project):
    lines = (project / lock.CUDA_LOCK).read_text()
    (project / lock.CUDA_LOCK).write_text(lines[: lines.index("triton==")])
    assert "which a CUDA build of torch needs, is missing" in audited()[2]


def test_another_version_in_the_environment_is_named(audited, project):
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    listed = json.dumps([{"name": "torch", "version": "2.13.0+cpu"}, {"name": "HTTPX", "version": "0.27"}])
    python.write_text(f"#!/bin/sh\necho '{listed}'\n")
    python.chmod(0o755)
    assert "httpx 0.27 is installed, the lock has httpx==0.28.1" in audited()[2]


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        ("no route to host", 0, "NOT CHECKED, the service cannot be asked from here (no route to host)"),
        ([{"name": "idna", "version": "1", "skip_reason": "not found"}], 0, "NOT CHECKED, the service knows none of"),
        ([{"name": "idna", "version": "1", "vulns": []}], 0, "vulnerabilities: none known for 1 releases"),
        (
            [{"name": "idna", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}],
            1,
            "1 of 1 releases are vulnerable: idna==1 (CVE-1, fixed in 2)",
        ),
    ],
)
def test_vulnerabilities_or_an_unreachable_service_are_reported(audited, monkeypatch, answer, status, message):
    monkeypatch.setattr(audit, "ask_pip_audit", lambda *locks: answer)
    actual, out, errors = audited()
    assert actual == status and message in out + errors


def test_a_service_that_does_not_answer_is_reported(monkeypatch, tmp_path):
    for module in ("uv", "pip_audit"):
        (tmp_path / f"{module}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert isinstance(audit.ask_pip_audit(tmp_path / "a.lock"), str)
    with pytest.raises(AuditError, match=r"the package index could not be asked for a\.txt: exit status 1"):
        lock.published(tmp_path / "a.txt")


def test_a_tool_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "uv", None)
    monkeypatch.setitem(sys.modules, "pip_audit", None)
    with pytest.raises(AuditError, match=r"^uv is not installed in .*; run make lock or make audit"):
        lock.published(tmp_path / "a.txt")
    with pytest.raises(AuditError, match=r"^pip-audit is not installed in "):
        audit.check_vulnerabilities(tmp_path)


@pytest.mark.parametrize("tool", [lock, audit])
@pytest.mark.parametrize(("option", "status"), [("--help", 0), ("--nosuch", 2)])
def test_help_does_nothing_else(tool, option, status, monkeypatch, capsys):
    for work in ("published", "write", "audit"):
        monkeypatch.setattr(tool, work, None, raising=False)
    with pytest.raises(SystemExit) as ended:
        tool.main([option])
    said = capsys.readouterr()
    assert ended.value.code == status and f"usage: python -m {tool.__name__}" in said.out + said.err


def test_a_lock_keeps_a_cpu_build_while_its_release_stays(project):
    found = {**read_pins(project / lock.LOCK), **read_pins(project / lock.CUDA_LOCK)}
    torch = found["torch"].version
    wheel = project / f"torch-{torch}+own-cp312-cp312-manylinux_2_28_x86_64.whl"
    wheel.write_bytes(b"a wheel")
    sha256 = hashlib.sha256(b"a wheel").hexdigest()
    before = read_pins(project / lock.CPU_LOCK)["torch"].hashes
    lock.write(project, found, [wheel])
    lock.write(project, found, [])
    assert read_pins(project / lock.CPU_LOCK)["torch"].hashes == before | {sha256}
    assert built_elsewhere(project / lock.CPU_LOCK)[sha256] == wheel.name
    for name in (lock.LOCK, lock.CUDA_LOCK):
        assert (project / name).read_text() == (ROOT / name).read_text()
    with pytest.raises(AuditError, match=r"not a wheel of torch==2\.14 as requirements"):
        change(project / "requirements.txt", f"torch=={torch}", "torch==2.14")
        lock.write(project, found, [wheel])
    lock.write(project, found | {"torch": Pin("torch", "2.14", frozenset([64 * "0"]))}, [])
    assert not read_pins(project / lock.CPU_LOCK)["torch"].hashes
