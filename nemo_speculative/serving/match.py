"""Whether a target is the one that a draft was trained for: beside another it accepts nothing, without a word."""

from pathlib import Path
from typing import Any

from nemo_speculative.serving.command import ServeOptions, read_remembered
from nemo_speculative.targets.embedding_and_head import target_fingerprint, text_config
from nemo_speculative.utils.errors import UsageError


def check_target(options: ServeOptions, variant: bool = False) -> None:
    """Refuses a directory that holds another model than the draft was trained for; a hub name is not looked up.

    Args:
        variant: accept other weights of the same shape, such as a quantised copy.

    Raises:
        UserError: it is another model, or none.
    """
    directory = Path(options.target)
    if not directory.is_dir():
        return
    remembered = read_remembered(options.draft)
    provenance = remembered.provenance
    config = text_config(directory, options.trust_remote_code)
    if unlike := _differences(remembered.shape, config):
        raise UsageError(
            f"--target {directory}: not the model that {options.draft} was trained for ({'; '.join(unlike)}); give "
            f"that one, remembered as {provenance.target}"
        )
    found = target_fingerprint(directory)
    if not variant and found != provenance.target_fingerprint:
        raise UsageError(
            f"--target {directory}: its configuration or weights are not those that {options.draft} was trained for "
            f"(fingerprint {provenance.target_fingerprint}, found {found}); give that model, or add --target-variant "
            "if this is a copy of it, such as a quantised one"
        )


def _differences(shape: Any, config: Any) -> list[str]:
    trained_for = {
        "hidden_size": getattr(shape, "target_hidden_size", shape.hidden_size),
        "vocab_size": shape.vocab_size,
    }
    found = {name: getattr(config, name) for name in trained_for}
    unlike = [f"{name} is {found[name]}, expected {want}" for name, want in trained_for.items() if found[name] != want]
    # SGLang captures a layer's output at the entry of the next one.
    least = max(getattr(shape, "aux_layers", (-2,))) + 2
    if config.num_hidden_layers < least:
        unlike.append(f"num_hidden_layers is {config.num_hidden_layers}, expected at least {least}")
    return unlike
