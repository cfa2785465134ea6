"""The directory of a target's files."""

from pathlib import Path

from huggingface_hub import snapshot_download

from nemo_speculative.config.schema import ModelConfig
from nemo_speculative.utils.errors import UserError, describe_error


def resolve_target(config: ModelConfig, weights: bool = True, key: str = "model.path") -> Path:
    """The local directory of ``config.path``: a directory, the hub's cache, or a download into it.

    ``weights``: whether to download these too; ``key``: the configuration key that names the path, for errors.

    Raises:
        UserError: it is neither a model directory nor available on the hub.
    """
    local = Path(config.path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"{key}: {local} has no config.json; expected a Hugging Face model directory")
        return local
    if local.is_absolute() or config.path.startswith(".") or config.path.count("/") != 1:
        raise UserError(f"{key}: {config.path} does not exist; expected a Hugging Face model directory")
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many classes
        raise UserError(
            f"{key}: the weights of {config.path} are not on this machine and could not be downloaded from the hub "
            f"({describe_error(error, 100)}); point {key} at a directory that holds them: {key}=/path/to/model"
        ) from None
