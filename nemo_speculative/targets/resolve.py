"""Where a target's files are, before anything heavy starts."""

from pathlib import Path

from huggingface_hub import snapshot_download

from nemo_speculative.config.schema import ModelConfig
from nemo_speculative.utils.errors import UserError, describe_error

DESCRIPTION = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
WEIGHTS = ["*.safetensors"]


def resolve_target(config: ModelConfig, weights: bool = True, key: str = "model.path") -> Path:
    """The local directory of ``config.path``: a directory, the hub's cache, or a download into it.

    Without ``weights`` only the configuration and the tokenizer are downloaded; ``key`` is where the path was given.

    Raises:
        UserError: it is neither a model directory nor to be had from the hub.
    """
    local = Path(config.path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"{key}: {local} has no config.json; expected a Hugging Face model directory")
        return local
    if local.is_absolute() or config.path.startswith(".") or config.path.count("/") != 1:
        raise UserError(f"{key}: {config.path} does not exist; expected a Hugging Face model directory")
    wanted = DESCRIPTION + WEIGHTS if weights else DESCRIPTION
    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=wanted))
    except Exception as error:  # one class per way in which a hub can fail
        raise UserError(
            f"{key}: the weights of {config.path} are not on this machine and the hub could not give them "
            f"({describe_error(error, 100)}); point {key} at a directory that holds them: {key}=/path/to/model"
        ) from None
