"""The SGLang installation in this Python environment: its version, its parser, its CPU engine."""

import contextlib
import io
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_speculative.utils.errors import UsageError

CPU_ENGINE = Path(__file__).parents[1] / "serving" / "cpu"
"""Goes in front of PYTHONPATH: its ``sgl_kernel`` replaces the compiled one, of which no CPU build is published."""
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
"""One thread: models that a CPU can serve are too small to gain from more.  No compilation: it needs a C++ compiler and
takes 16 s instead of 0.3 s to the first answer (embedded target, 2 cores)."""


def installed_version() -> str | None:
    """The installed version of SGLang; None where there is none."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def parse_flags(flags: list[str], description: str) -> Any:
    """SGLang's ``ServerArgs`` from ``flags``; raises UsageError, which calls them ``description``, or ImportError."""
    from sglang.srt.server_args import prepare_server_args

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):  # argparse prints its whole usage in front of the error
            return prepare_server_args(flags)
    except SystemExit:
        raise UsageError(f"SGLang refuses {description}: {stderr.getvalue().strip().splitlines()[-1]}") from None
    except ValueError as error:  # older versions resolve defaults while they parse
        raise UsageError(f"SGLang refuses {description}: {error}") from None
