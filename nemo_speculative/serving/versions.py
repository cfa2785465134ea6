"""Drafts that each version of SGLang can serve, and its flag names (from its source: 0.5.9, .13, .14, .17, .23)."""

from typing import Any

from nemo_speculative.utils.errors import UsageError, UserError

OLDEST, NEWEST = "0.5.9", "0.5.23"
EXPORTER_KEY = "exporter.sglang_version"
SINCE = {"fc_norm": "0.5.14", "norm_output": "0.5.14", "norm_before_fc": "0.5.17"}
"""The first of these versions that applies a switch of the draft."""
SEVERAL_LAYERS = "0.5.14"
"""The first version that serves EAGLE-3 drafts of more than one layer."""
FLAGS = {
    "--cuda-graph-max-bs": {"0.5.9": "--cuda-graph-max-bs", "0.5.14": "--cuda-graph-max-bs-decode"},
    "--rejection-sampling": {"0.5.14": "--speculative-use-rejection-sampling"},
    # The stand-in CPU kernels (serving/cpu) have the interface of this version.
    "--device cpu": {"0.5.23": "--device"},
}
"""SGLang's name for each option, by the first version that has it."""


def flag(option: str, sglang: str) -> str:
    """The flag of version ``sglang`` for ``option``, one of :data:`FLAGS`; raises UsageError if it has none."""
    known = [name for since, name in FLAGS[option].items() if parse_version(since) <= parse_version(sglang)]
    if not known:
        raise UsageError(f"{option} takes SGLang {next(iter(FLAGS[option]))} or later, and this is for {sglang}")
    return known[-1]


def require_supported(sglang: str) -> None:
    """Raises UsageError for a version outside the supported range."""
    if not parse_version(OLDEST) <= parse_version(sglang, "--sglang-version") <= parse_version(NEWEST):
        raise UsageError(
            f"SGLang {sglang} is not supported, only {OLDEST} to {NEWEST}: install one of these, or name the one that "
            "will serve with --sglang-version"
        )


def check_servable(shape: Any, sglang: str, key: str = EXPORTER_KEY) -> None:
    """Raises UserError if version ``sglang``, set by the option ``key``, would serve a draft wrongly or not at all."""
    needs = [(f"draft.{name}=true", since) for name, since in SINCE.items() if getattr(shape, name, False)]
    if shape.num_layers > 1 and hasattr(shape, "aux_layers"):
        needs.append((f"draft.num_layers={shape.num_layers}", SEVERAL_LAYERS))
    for switch, since in needs:
        if parse_version(sglang, key) < parse_version(since):
            raise UserError(
                f"{switch} cannot be served by SGLang {sglang}; {since} and later can: set {key} to the version that "
                f"will serve it, or train with another {switch.split('=')[0]}"
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


def parse_version(sglang: str, key: str = EXPORTER_KEY) -> tuple[int, ...]:
    """``0.5.23`` as a tuple of numbers; raises UserError, which names the option ``key``, if it is not a version."""
    try:
        return tuple(int(part) for part in sglang.split(".")[:3])
    except ValueError:
        raise UserError(f"{key} is {sglang!r}: expected one such as {NEWEST}") from None
