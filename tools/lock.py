"""Writes the locks: ``make lock``, after requirements.txt has changed.

requirements.lock has what requirements.txt has but for torch, each release with the sha256 sums of all its files, for
every Python and platform.  With it goes either requirements-cuda.lock, torch as the package index has it and what that
needs, or requirements-cpu.lock, a build of torch without CUDA, which comes from elsewhere: ``python -m tools.lock
WHEEL…`` adds its files, and those that the lock has stay as long as the release does.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name, parse_wheel_filename

from tools.requirements import AuditError, Pin, built_elsewhere, parse_pins, read_pins, run_module

ROOT = Path(__file__).parents[1]
REQUIREMENTS, LOCK = "requirements.txt", "requirements.lock"
CUDA_LOCK, CPU_LOCK = "requirements-cuda.lock", "requirements-cpu.lock"
BUILT = "torch"
"""What is released in builds that need other things."""
PLATFORM, PYTHON = "x86_64-manylinux_2_28", "3.11"
"""Whose dependencies are looked up; the hashes are of all files."""
CACHE = Path(sys.prefix) / "cache"
"""Beside the program that fills it: nothing is left in the user's home."""
HEAD = """\
# {what}, each release with the sha256 sums of its files.
# Made by `make lock` from requirements.txt; checked by `make audit`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.lock", description="Writes the locks from requirements.txt.")
    parser.add_argument("wheels", nargs="*", type=Path, help="builds of torch without CUDA, to be in the lock, too")
    wheels = parser.parse_args(arguments).wheels
    try:
        write(ROOT, published(ROOT / REQUIREMENTS), wheels)
    except AuditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def published(requirements: Path, constraint: Path | None = None) -> dict[str, Pin]:
    """What the package index has for ``requirements`` and all that they need, without downloading it.

    Args:
        constraint: pins of what else is needed; without, the newest.

    Raises:
        AuditError: the index cannot be asked, or has no such releases.
    """
    command = ["pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate"]
    command += ["--cache-dir", str(CACHE)]
    command += ["--constraint", str(constraint)] if constraint else []
    done = run_module("uv", *command, "--python-platform", PLATFORM, "--python-version", PYTHON, str(requirements))
    if done.returncode:
        said = " ".join(done.stderr.split())[:300] or f"exit status {done.returncode}"
        raise AuditError(f"the package index could not be asked for {requirements.name}: {said}")
    return parse_pins(done.stdout, "the package index")


def write(root: Path, found: Mapping[str, Pin], wheels: Iterable[Path]) -> None:
    """The locks of ``root``, from what the index has and ``wheels`` of another build."""
    wanted = read_pins(root / REQUIREMENTS)
    built = wanted[BUILT]
    builds = _kept(root / CPU_LOCK, built) | dict(_of_wheel(wheel, built) for wheel in wheels)
    (root / LOCK).write_text(
        HEAD.format(what="What requirements.txt pins, but for torch")
        + _entries(found[name] for name in sorted(wanted.keys() - {BUILT}))
    )
    (root / CUDA_LOCK).write_text(
        HEAD.format(what="torch with CUDA, and what that needs beside requirements.lock")
        + _entries(found[name] for name in sorted(found.keys() - wanted.keys() | {BUILT}))
    )
    (root / CPU_LOCK).write_text(
        HEAD.format(what="torch without CUDA, beside requirements.lock")
        + "".join(f"# {wheel} sha256:{sha256}\n" for sha256, wheel in sorted(builds.items()))
        + _entries([Pin(built.name, built.version, frozenset(builds))])
    )


def _kept(lock: Path, built: Pin) -> dict[str, str]:
    if not lock.exists():
        return {}
    return {sha256: wheel for sha256, wheel in built_elsewhere(lock).items() if _is_of(wheel, built)}


def _of_wheel(wheel: Path, built: Pin) -> tuple[str, str]:
    if not _is_of(wheel.name, built):
        raise AuditError(f"{wheel}: not a wheel of {built} as {REQUIREMENTS} has it")
    return hashlib.sha256(wheel.read_bytes()).hexdigest(), wheel.name


def _is_of(wheel: str, built: Pin) -> bool:
    name, version, *_ = parse_wheel_filename(wheel)
    return canonicalize_name(name) == built.name and version.public == built.version


def _entries(pins: Iterable[Pin]) -> str:
    return "".join(" \\\n    --hash=sha256:".join([str(pin), *sorted(pin.hashes)]) + "\n" for pin in pins)


if __name__ == "__main__":
    sys.exit(main())
