"""Check that a target is the model that a draft was trained for: another one rejects all proposals without an error."""

import json
from pathlib import Path
from typing import Any

from nemo_speculative.serving.command import ServeOptions, read_recorded_settings
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.utils.errors import UsageError

SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")


def check_target(options: ServeOptions, variant: bool = False) -> None:
    """Refuses a directory that holds another model than the draft was trained for; a hub name is not looked up.

    Args:
        variant: accept other weights of the same shape, such as a quantized copy.

    Raises:
        UserError: the directory holds another model, or none.
    """
    directory = Path(options.target)
    if not directory.is_dir():
        return
    recorded = read_recorded_settings(options.draft)
    shape, provenance = recorded.shape, recorded.provenance
    sizes = _sizes(directory, options.trust_remote_code)
    expected = {
        "hidden_size": getattr(shape, "target_hidden_size", shape.hidden_size),
        "vocab_size": shape.vocab_size,
    }
    differences = [f"{key} is {sizes[key]}, expected {value}" for key, value in expected.items() if sizes[key] != value]
    # SGLang captures a layer's output as the input of the next one.
    min_layers = max(getattr(shape, "aux_layers", (-2,))) + 2
    if sizes["num_hidden_layers"] < min_layers:
        differences.append(f"num_hidden_layers is {sizes['num_hidden_layers']}, expected at least {min_layers}")
    if differences:
        raise UsageError(
            f"--target {directory}: not the model that {options.draft} was trained for ({'; '.join(differences)}); "
            f"give that one, recorded as {provenance.target}"
        )
    fingerprint = target_fingerprint(directory)
    if not variant and fingerprint != provenance.target_fingerprint:
        raise UsageError(
            f"--target {directory}: its configuration or weights are not those that {options.draft} was trained for "
            f"(fingerprint {provenance.target_fingerprint}, found {fingerprint}); give that model, or add "
            "--target-variant if this is a copy of it, such as a quantized one"
        )


def _sizes(directory: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Sizes of the (text) model in ``directory``.

    Read from ``config.json`` itself where it states them under these names; transformers, which is slow to import,
    resolves the other cases (defaults, other names, nested configurations).
    """
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        config = None  # transformers states the reason
    if isinstance(config, dict):
        nested = any(isinstance(value, dict) and "hidden_size" in value for value in config.values())
        if not nested and all(type(config.get(key)) is int for key in SIZES):
            return {key: config[key] for key in SIZES}
    from nemo_speculative.targets.embedding_and_head import text_config

    resolved = text_config(directory, trust_remote_code)
    return {key: getattr(resolved, key) for key in SIZES}
