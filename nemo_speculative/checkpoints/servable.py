"""The servable directory: ``config.json`` and ``model.safetensors`` as SGLang reads them.

SGLang skips tensors that it does not know and leaves missing ones unfilled without a word, so what is written and what
is read is checked here, strictly: names, shapes, dtypes and the fields of the configuration.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_speculative import __version__
from nemo_speculative.drafts.eagle3 import Eagle3Draft, Eagle3Shape
from nemo_speculative.errors import UserError
from nemo_speculative.speculative import Speculative

ARCHITECTURE = "LlamaForCausalLMEagle3"
ALGORITHMS = {ARCHITECTURE: "EAGLE3"}
"""SGLang's --speculative-algorithm of each architecture."""
OWN_KEY = "nemo_speculative"
FIXED_FLAGS = {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint remembers beside its weights."""

    target: str
    """The target's directory or hub name."""
    target_fingerprint: str
    target_dtype: str
    """float32 or bfloat16."""
    speculative: Speculative
    step: int
    """Optimizer steps it was trained for."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Provenance":
        known = {k: values[k] for k in ("target", "target_fingerprint", "target_dtype", "step")}
        return cls(**known, speculative=Speculative(**values["speculative"]))


@dataclass(frozen=True)
class Servable:
    """A checkpoint read back."""

    directory: Path
    shape: Eagle3Shape
    provenance: Provenance
    tensors: dict[str, torch.Tensor]

    @property
    def algorithm(self) -> str:
        return ALGORITHMS[ARCHITECTURE]

    def build(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Eagle3Draft:
        """The draft with its weights, in eval mode; ``dtype`` null keeps that of the file."""
        draft = Eagle3Draft(self.shape).to(dtype or self.tensors["fc.weight"].dtype)
        draft.load_state_dict(self.tensors)
        return draft.to(device).eval().requires_grad_(False)


def config_of(
    shape: Eagle3Shape, provenance: Provenance, dtype: torch.dtype, special_ids: dict[str, Any]
) -> dict[str, Any]:
    """The contents of ``config.json``."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": dict(shape.rope_parameters),
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
        **FIXED_FLAGS,
        **_said_twice(shape),
        **special_ids,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(shape.aux_layers)},
        OWN_KEY: {**asdict(provenance), "version": __version__},
    }


def _said_twice(shape: Eagle3Shape) -> dict[str, Any]:
    """Fields that follow from others: older engines read the first two where transformers 5 reads rope_parameters."""
    rope = shape.rope_parameters
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        "num_aux_hidden_states": len(shape.aux_layers),
        "target_hidden_size": shape.hidden_size,
    }


def shape_of(config: dict[str, Any], where: Path) -> Eagle3Shape:
    """The network that a ``config.json`` describes.

    Raises:
        UserError: a field is missing or says what SGLang would misread.
    """
    fixed = {"architectures": [ARCHITECTURE], "model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu"}
    _check_fields(config, fixed | FIXED_FLAGS, where)
    try:
        shape = Eagle3Shape(
            hidden_size=_number(config, "hidden_size", where),
            intermediate_size=_number(config, "intermediate_size", where),
            num_heads=_number(config, "num_attention_heads", where),
            num_kv_heads=_number(config, "num_key_value_heads", where),
            head_dim=_number(config, "head_dim", where),
            rms_norm_eps=_number(config, "rms_norm_eps", where, float),
            max_positions=_number(config, "max_position_embeddings", where),
            rope_parameters=config["rope_parameters"],
            vocab_size=_number(config, "vocab_size", where),
            draft_vocab_size=_number(config, "draft_vocab_size", where),
            aux_layers=_aux_layers(config["eagle_config"], where),
        )
    except KeyError as error:
        raise UserError(f"{where}: the field {error.args[0]} is missing") from None
    if shape.draft_vocab_size > shape.vocab_size:
        raise UserError(f"{where}: draft_vocab_size is {shape.draft_vocab_size}, vocab_size {shape.vocab_size}")
    if not isinstance(shape.rope_parameters, dict):
        raise UserError(f"{where}: rope_parameters is {shape.rope_parameters!r}, expected an object")
    _check_fields(config, _said_twice(shape), where)
    return shape


def _check_fields(config: dict[str, Any], expected: dict[str, Any], where: Path) -> None:
    for key, value in expected.items():
        if key not in config:
            raise UserError(f"{where}: the field {key} is missing")
        if config[key] != value:
            raise UserError(f"{where}: {key} is {config[key]!r}, expected {value!r}")


def _number(config: dict[str, Any], key: str, where: Path, *kinds: type) -> Any:
    value = config[key]
    if type(value) not in (int, *kinds) or value <= 0:
        raise UserError(f"{where}: {key} is {value!r}, expected a number above 0")
    return value


def _aux_layers(eagle: Any, where: Path) -> tuple[int, ...]:
    layers: Any = eagle.get("eagle_aux_hidden_state_layer_ids") if isinstance(eagle, dict) else None
    numbers = isinstance(layers, list) and bool(layers) and all(type(v) is int and v >= 0 for v in layers)
    if not numbers or len(set(layers)) != len(layers) or eagle.get("use_aux_hidden_state") is not True:
        raise UserError(
            f"{where}: eagle_config is {eagle!r}, expected use_aux_hidden_state=true and distinct layer ids"
        )
    return tuple(layers)


def check_tensors(tensors: dict[str, torch.Tensor], shape: Eagle3Shape, where: Path) -> None:
    """Refuses tensors that are missing, surplus, of another shape or dtype, or a d2t that is not an ascending offset.

    Raises:
        UserError: naming every offending tensor.
    """
    with torch.device("meta"):
        expected = Eagle3Draft(shape).state_dict()
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is unknown" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        want, found = expected[name], tensors[name]
        if want.shape != found.shape:
            problems.append(f"{name} is {list(found.shape)}, expected {list(want.shape)}")
        elif found.dtype not in (DTYPES if want.is_floating_point() else (want.dtype,)):
            problems.append(f"{name} is {found.dtype}, expected {want.dtype}")
        elif found.is_floating_point() and not found.isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    if not problems:
        problems = _vocabulary_problems(tensors["d2t"], tensors["t2d"])
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")


def _vocabulary_problems(d2t: torch.Tensor, t2d: torch.Tensor) -> list[str]:
    ids = torch.arange(len(d2t)) + d2t.cpu()
    if ids[0] < 0 or ids[-1] >= len(t2d) or (ids.diff() <= 0).any():
        return ["d2t does not give ascending target ids as offsets (target id = j + d2t[j])"]
    inside = torch.zeros_like(t2d.cpu())
    inside[ids] = True
    return [] if torch.equal(inside, t2d.cpu()) else ["t2d does not mark the ids of d2t"]


def write_servable(
    directory: Path, tensors: dict[str, torch.Tensor], shape: Eagle3Shape, provenance: Provenance,
    dtype: torch.dtype, special_ids: dict[str, Any],
) -> None:  # fmt: skip
    """Writes ``config.json`` and ``model.safetensors``, checked as the reader checks them.

    Raises:
        UserError: SGLang would misread it; nothing is written then.
        OSError: the disk is full or not writable.
    """
    cast = {k: (v.to(dtype) if v.is_floating_point() else v).cpu().contiguous() for k, v in tensors.items()}
    config = config_of(shape, provenance, dtype, special_ids)
    check_tensors(cast, shape_of(config, directory), directory)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        save_file(cast, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # wraps what the file system said
        raise OSError(str(error)) from error
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("model.safetensors", "config.json"):
        _sync(directory / name)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_servable(path: str | Path) -> Servable:
    """Reads and checks the checkpoint at ``path``: a run directory, a ``step_<N>`` directory or its ``model/``.

    Raises:
        UserError: there is none, it is cut off, or it is not what SGLang expects.
    """
    directory = find_model(path)
    config = read_config(directory)
    shape = shape_of(config, directory / "config.json")
    try:
        tensors = load_file(directory / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory}/model.safetensors: cut off or not readable ({error})") from None
    check_tensors(tensors, shape, directory / "model.safetensors")
    return Servable(directory, shape, provenance_of(config, directory), tensors)


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}/config.json: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{directory}/config.json: found a {type(config).__name__}, expected a JSON object")
    return config


def provenance_of(config: dict[str, Any], directory: Path) -> Provenance:
    """What the checkpoint remembers.

    Raises:
        UserError: it was not written by this project.
    """
    try:
        return Provenance.from_dict(config[OWN_KEY])
    except (KeyError, TypeError):
        raise UserError(
            f"{directory}/config.json: no usable {OWN_KEY!r} section; expected a checkpoint written by this project"
        ) from None


def find_model(path: str | Path) -> Path:
    """The ``model/`` directory meant by a run directory (its best, else its latest), a step directory or itself.

    Raises:
        UserError: the path is missing or holds no checkpoint.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise UserError(f"{given} does not exist; expected a run directory, a step_<N> directory or its model/")
    candidates = [given, given / "model"]
    candidates += [given / folder / link / "model" for link in ("best", "latest") for folder in ("checkpoints", ".")]
    for candidate in candidates:
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    raise UserError(f"{given} holds no checkpoint; expected a run directory, a step_<N> directory or its model/")
