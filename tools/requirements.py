"""Reader of requirement files: pins, and the hashes of the files that may be installed for them."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})(?!\S)")
BUILT_ELSEWHERE = re.compile(r"^# (\S+\.whl) sha256:([0-9a-f]{64})$", re.MULTILINE)
"""A wheel of the same version that the package index does not have."""


class AuditError(Exception):
    """A problem of a dependency, as one line."""


@dataclass(frozen=True)
class Pin:
    """One release, with the sha256 sums of its files; empty if the requirement file has none."""

    name: str
    version: str
    hashes: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m module`` of this environment, whatever its exit status.

    Raises:
        AuditError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        package = canonicalize_name(module)
        raise AuditError(f"{package} is not installed in {sys.prefix}; run make lock or make audit, which install it")
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)


def read_pins(file: Path) -> dict[str, Pin]:
    """The pins of a requirement file or lock by their canonical names.

    Raises:
        AuditError: a line names no single release.
    """
    return parse_pins(file.read_text(), file.name)


def parse_pins(text: str, source: str) -> dict[str, Pin]:
    """Parses the text of such a file, which errors name as ``source``."""
    lines = (line.split("#")[0].strip() for line in text.replace("\\\n", " ").splitlines())
    return {pin.name: pin for pin in (_pin(line, source) for line in lines if line)}


def built_elsewhere(file: Path) -> dict[str, str]:
    """Wheels of builds that the package index does not have, by hash."""
    return {sha256: wheel for wheel, sha256 in BUILT_ELSEWHERE.findall(file.read_text())}


def _pin(line: str, source: str) -> Pin:
    text = line.split(" --hash")[0].strip()
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        raise AuditError(f"{source}: {text!r} is no requirement; expected name==version") from None
    versions = [s.version for s in requirement.specifier if s.operator == "==" and not s.version.endswith(".*")]
    if len(versions) != 1 or len(requirement.specifier) != 1:
        raise AuditError(f"{source}: {text} is not pinned; expected {requirement.name}==version")
    return Pin(canonicalize_name(requirement.name), versions[0], frozenset(HASH.findall(line)))
