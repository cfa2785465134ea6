"""Checks of the pinned dependencies: ``make audit``.

The locks must agree with pyproject.toml and requirements.txt; the package index must have every hash in them; ``.venv``
must contain the versions in the locks; and if a service can be asked, no release may have a known vulnerability.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.lock import CACHE, CPU_LOCK, CUDA_LOCK, LOCK, REQUIREMENTS, ROOT, published
from tools.requirements import AuditError, built_elsewhere, read_pins, run_module

PINNED_TOO = ("requirements-sglang.txt", "requirements-peers.txt", "requirements-audit.txt")
"""Requirements of separate environments, pinned by version only."""
SEPARATE_EXTRAS = ("sglang", "slurm")
"""Extras of pyproject.toml that ``make setup`` does not install."""


def main(arguments: Sequence[str] | None = None) -> int:
    description = "Checks the locks, what is installed, and for known vulnerabilities."
    argparse.ArgumentParser("python -m tools.audit", description=description).parse_args(arguments)
    return audit(ROOT)


def audit(root: Path) -> int:
    """Runs every check and prints its result; returns 0 if all pass, else 1."""
    checks: list[Callable[[Path], str]] = [check_pins, check_hashes, check_installed, check_vulnerabilities]
    status = 0
    for check in checks:
        try:
            print(check(root), flush=True)
        except AuditError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            status = 1
    return status


def check_pins(root: Path) -> str:
    """Compares the pins with pyproject.toml and the locks.

    Raises:
        AuditError: a dependency is not pinned, or its pin differs from pyproject.toml or the lock.
    """
    pins, cuda, cpu = (read_pins(root / file) for file in (REQUIREMENTS, CUDA_LOCK, CPU_LOCK))
    locked = read_pins(root / LOCK) | {name: pin for name, pin in cuda.items() if name in pins}
    for requirement in _dependencies(root):
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            raise AuditError(f"{REQUIREMENTS}: {requirement.name} of pyproject.toml is not pinned; pin it, make lock")
        if not requirement.specifier.contains(pin.version, prereleases=True):
            raise AuditError(f"{REQUIREMENTS}: {pin} is not what pyproject.toml asks for ({requirement})")
    for name, pin in pins.items():
        if name not in locked:
            raise AuditError(f"{LOCK}: {pin} of {REQUIREMENTS} is missing; make lock")
        if locked[name].version != pin.version:
            raise AuditError(f"{LOCK}: {locked[name]} is not the {pin} of {REQUIREMENTS}; make lock")
    if strangers := sorted(locked.keys() - pins.keys()):
        raise AuditError(f"{LOCK}: {strangers[0]} is not in {REQUIREMENTS}; make lock")
    for name, pin in cpu.items():
        if pin.version != locked[name].version:
            raise AuditError(f"{CPU_LOCK}: {pin} is not the {locked[name]} of {REQUIREMENTS}; make lock WHEELS=…")
    for file in (LOCK, CUDA_LOCK, CPU_LOCK):
        for pin in read_pins(root / file).values():
            if not pin.hashes:
                raise AuditError(f"{file}: {pin} has no sha256 hash; make lock")
    for file in PINNED_TOO:
        read_pins(root / file)
    return f"pins: {len(pins)} releases cover pyproject.toml, and the lock has them all with hashes"


def _dependencies(root: Path) -> Iterator[Requirement]:
    """Dependencies of the package, and of the extras that ``make setup`` installs."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {})
    requirements = list(project["dependencies"])
    for extra, dependencies in extras.items():
        requirements += dependencies if extra not in SEPARATE_EXTRAS else []
    own = canonicalize_name(project["name"])
    return (r for r in map(Requirement, requirements) if canonicalize_name(r.name) != own)


def check_hashes(root: Path) -> str:
    """Compares the hashes in the locks with the package index.

    Raises:
        AuditError: the index has no file with that hash for a release, or cannot be asked.
    """
    index = published(root / REQUIREMENTS, constraint=root / CUDA_LOCK)
    locked = read_pins(root / LOCK) | read_pins(root / CUDA_LOCK)
    for name, pin in locked.items():
        if name not in index or index[name].version != pin.version:
            raise AuditError(f"{CUDA_LOCK}: {pin} is not what torch needs; make lock")
        if unknown := sorted(pin.hashes - index[name].hashes):
            raise AuditError(f"{pin}: sha256 {unknown[0][:16]}… is of no file that the index has; do not install it")
    if missing := sorted(index.keys() - locked.keys()):
        raise AuditError(f"{CUDA_LOCK}: {index[missing[0]]}, which a CUDA build of torch needs, is missing; make lock")
    count = sum(len(pin.hashes) for pin in locked.values())
    others = ", ".join(sorted(built_elsewhere(root / CPU_LOCK).values()))
    return f"hashes: all {count} are those of files on the package index, which was not asked for {others}"


def check_installed(root: Path) -> str:
    """Compares the packages in ``.venv`` with the locks.

    Raises:
        AuditError: an installed version differs from the lock.
    """
    python = root / ".venv" / "bin" / "python"
    if not python.exists():
        return "installed: nothing to compare, there is no .venv (make setup)"
    command = [python, "-m", "pip", "list", "--format", "json"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    locked = read_pins(root / LOCK) | read_pins(root / CUDA_LOCK)
    compared = {canonicalize_name(one["name"]): one["version"].split("+")[0] for one in json.loads(listed.stdout)}
    for name in sorted(compared.keys() & locked.keys()):
        if compared[name] != locked[name].version:
            raise AuditError(
                f".venv: {name} {compared[name]} is installed, the lock has {locked[name]}; make setup anew"
            )
    return f"installed: {len(compared.keys() & locked.keys())} of {len(locked)} releases, in the versions of the lock"


def check_vulnerabilities(root: Path) -> str:
    """Asks a service for known vulnerabilities of the releases in the locks.

    Raises:
        AuditError: a release has one, or pip-audit is not installed.
    """
    answer = ask_pip_audit(root / LOCK, root / CUDA_LOCK)
    if isinstance(answer, str):
        return f"vulnerabilities: NOT CHECKED, the service cannot be asked from here ({answer})"
    known = [one for one in answer if "skip_reason" not in one]
    if not known:
        return f"vulnerabilities: NOT CHECKED, the service knows none of the {len(answer)} releases (is it a mirror?)"
    if bad := [one for one in known if one["vulns"]]:
        raise AuditError(f"{len(bad)} of {len(known)} releases are vulnerable: {', '.join(map(_named, bad))}")
    unknown = [str(one["name"]) for one in answer if "skip_reason" in one]
    suffix = f"; not known to it: {', '.join(unknown)}" if unknown else ""
    return f"vulnerabilities: none known for {len(known)} releases{suffix}"


def ask_pip_audit(*locks: Path) -> list[dict[str, Any]] | str:
    """pip-audit's result for each release, or the reason why it has none."""
    files = [part for lock in locks for part in ("--requirement", str(lock))]
    files += ["--cache-dir", str(CACHE)]
    done = run_module("pip_audit", "--disable-pip", "--require-hashes", "--format", "json", *files)
    try:
        return json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]


def _named(release: Mapping[str, Any]) -> str:
    problems = ", ".join(f"{v['id']}, fixed in {' '.join(v['fix_versions']) or 'none'}" for v in release["vulns"])
    return f"{release['name']}=={release['version']} ({problems})"


if __name__ == "__main__":
    sys.exit(main())
