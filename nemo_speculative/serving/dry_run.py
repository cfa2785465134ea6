"""What SGLang itself understands of the command, with nothing started."""

from typing import Any

from nemo_speculative.serving.command import ServeOptions, serve_flags
from nemo_speculative.serving.flags import parse_flags
from nemo_speculative.utils.errors import UsageError


def understood(options: ServeOptions) -> dict[str, Any]:
    """The settings that matter to a draft, under SGLang's names, as its own parser reads them.

    Raises:
        UsageError: SGLang cannot be imported, refuses the command, or reads something else in it than was meant.
    """
    try:
        found = parse_flags(serve_flags(options), "the command")
    except ImportError as error:
        raise UsageError(f"SGLang cannot be imported ({error}); install it as docs/serving.md says") from None
    meant = _meant(options)
    settings = {name: getattr(found, name) for name in meant}
    for name, value in settings.items():
        if value != meant[name]:
            raise UsageError(
                f"SGLang reads {name} as {value!r}, and {meant[name]!r} was meant: look behind -- for a flag that it "
                "takes for this one"
            )
    return settings


def _meant(options: ServeOptions) -> dict[str, Any]:
    return {
        "model_path": options.target,
        "speculative_algorithm": options.algorithm,
        "speculative_draft_model_path": str(options.draft),
        "speculative_num_steps": options.speculative.num_steps,
        "speculative_eagle_topk": options.speculative.topk,
        "speculative_num_draft_tokens": options.speculative.num_draft_tokens,
        "dtype": options.dtype,
        "tp_size": options.tp_size,
        "host": options.host,
        "port": options.port,
        "trust_remote_code": options.trust_remote_code,
    }
