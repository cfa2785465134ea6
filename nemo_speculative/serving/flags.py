"""SGLang's own reading of the flags of its server."""

import contextlib
import io
from typing import Any

from nemo_speculative.utils.errors import UsageError


def parse_flags(flags: list[str], given_as: str) -> Any:
    """SGLang's ``ServerArgs``; ``given_as`` is what the user calls ``flags``.

    Raises:
        ImportError: SGLang cannot be imported.
        UsageError: its parser refuses them.
    """
    from sglang.srt.server_args import prepare_server_args

    said = io.StringIO()
    try:
        # argparse says what it does not know on stderr, below its whole usage.
        with contextlib.redirect_stderr(said):
            return prepare_server_args(flags)
    except SystemExit:
        raise UsageError(f"SGLang refuses {given_as}: {said.getvalue().strip().splitlines()[-1]}") from None
    except ValueError as error:  # older versions resolve what they parsed at once
        raise UsageError(f"SGLang refuses {given_as}: {error}") from None
