"""A checkpoint without its tensors: its directory, its ``config.json`` and what that records for serving.

Imports no heavy library, so that ``serve_sglang --print-only`` is quick.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_speculative.config.speculative import SpeculativeSettings
from nemo_speculative.utils.errors import UserError
from nemo_speculative.utils.files import atomic_write_text

OWN_KEY = "nemo_speculative"
"""Section of ``config.json`` that this project writes and servers ignore."""


@dataclass(frozen=True)
class Provenance:
    """Origin of a draft and the settings to serve it with, stored in ``config.json``."""

    target: str
    """The target's directory or hub name."""
    target_fingerprint: str
    target_dtype: str
    """dtype of the target: float32 or bfloat16."""
    speculative: SpeculativeSettings
    step: int
    """Optimizer steps it was trained for."""


def find_model(path: str | Path) -> Path:
    """The ``model/`` of a run directory (its best, else its latest checkpoint), of a step directory, or itself."""
    root = Path(path).expanduser()
    candidates = [root, root / "model"]
    candidates += [root / folder / link / "model" for link in ("best", "latest") for folder in ("checkpoints", ".")]
    for candidate in candidates:
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    problem = "holds no checkpoint" if root.exists() else "does not exist"
    raise UserError(f"{root} {problem}; expected a run directory, a step_<N> directory or its model/")


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model directory; raises UserError if it is missing or no JSON object."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}/config.json: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{directory}/config.json: found a {type(config).__name__}, expected a JSON object")
    return config


def provenance_of(config: dict[str, Any], directory: Path) -> Provenance:
    """The provenance in ``directory``'s ``config.json``; raises UserError if this project did not write it."""
    try:
        values = config[OWN_KEY]
        return Provenance(
            **{name: values[name] for name in ("target", "target_fingerprint", "target_dtype", "step")},
            speculative=SpeculativeSettings(**values["speculative"]),
        )
    except (KeyError, TypeError):
        raise UserError(
            f"{directory}/config.json: no usable {OWN_KEY!r} section; expected a checkpoint written by this "
            "project, or another one's after recipes/convert_draft.py"
        ) from None


def update_speculative_settings(directory: Path, speculative: SpeculativeSettings) -> None:
    """Atomically replaces the speculative settings in the ``config.json`` of ``directory``."""
    config = read_config(directory)
    config[OWN_KEY]["speculative"] = asdict(speculative)
    atomic_write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")


def check_not_truncated(directory: Path) -> None:
    """Raises UserError if the weights' size is not what their header states: 8 bytes of length, JSON, then the data."""
    file, problem = directory / "model.safetensors", "its header states another size"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(header_size, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if size == 8 + header_size + max(ends):
            return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = str(error)
    raise UserError(f"{file}: cut off or not readable ({problem})")
