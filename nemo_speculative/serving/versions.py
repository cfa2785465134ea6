"""What each version of SGLang can serve (read in 0.5.9, 0.5.14, 0.5.17 and 0.5.23)."""

from typing import Any

from nemo_speculative.errors import UserError

NEWEST = "0.5.23"
SINCE = {
    "fc_norm": "0.5.14",
    "norm_output": "0.5.14",
    "norm_before_fc": "0.5.17",
}
"""The first version that was read to apply a switch of the draft."""
SEVERAL_LAYERS = "0.5.14"


def check_servable(shape: Any, version: str) -> None:
    """Refuses a draft that SGLang ``version`` would serve wrongly, or not at all.

    Raises:
        UserError: naming the key and the version that could.
    """
    needs = [(f"draft.{name}=true", since) for name, since in SINCE.items() if getattr(shape, name, False)]
    if shape.num_layers > 1 and hasattr(shape, "aux_layers"):
        needs.append((f"draft.num_layers={shape.num_layers}", SEVERAL_LAYERS))
    for key, since in needs:
        if parse_version(version) < parse_version(since):
            raise UserError(
                f"{key} cannot be served by SGLang {version}; {since} and later can: change exporter.sglang_version "
                f"to the version that will serve it, or {key.split('=')[0]}"
            )
    if getattr(shape, "fc_width", 0) == shape.hidden_size:
        raise UserError(
            f"draft.aux_layers: {len(shape.aux_layers)} of {shape.target_hidden_size} features are as wide as the "
            f"draft's hidden size {shape.hidden_size}; no version of SGLang applies fc then: choose more aux layers, "
            "or another draft.hidden_size"
        )
    if getattr(shape, "draft_vocab_size", 0) is None and shape.own_embedding:
        raise UserError(
            f"draft.vocab_size is target_head: the target's head reads {shape.target_hidden_size} features, and "
            f"draft.hidden_size is {shape.hidden_size}; give the draft a head of its own, e.g. draft.vocab_size=auto"
        )


def parse_version(version: str) -> tuple[int, ...]:
    """``0.5.23`` as numbers.

    Raises:
        UserError: it is no version.
    """
    try:
        return tuple(int(part) for part in version.split(".")[:3])
    except ValueError:
        raise UserError(f"exporter.sglang_version is {version!r}: expected one such as {NEWEST}") from None
