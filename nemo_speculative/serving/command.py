"""The SGLang command line that serves a checkpoint, derived from what its ``config.json`` records.

A draft that is served with another algorithm or target has all its proposals rejected, without any error.  Target,
algorithm, dtype and speculative settings are therefore read from the checkpoint instead of being typed, and the target
is compared with the recorded one.  Needs neither SGLang nor the target's weights, imports neither torch nor
transformers, and writes nothing.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_speculative.algorithms.common.contract import DraftShape
from nemo_speculative.checkpoint.contract import shape_of
from nemo_speculative.checkpoint.metadata import Provenance, check_not_truncated, find_model, provenance_of, read_config
from nemo_speculative.config.speculative import SpeculativeSettings, default_draft_tokens, largest_tree, smallest_tree
from nemo_speculative.serving.versions import NEWEST, check_servable, flag, require_supported
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.utils.errors import UsageError, UserError
from nemo_speculative.utils.sglang import CPU_ENGINE, CPU_ENVIRONMENT, installed_version, parse_flags

CPU_FLAGS = (
    # The only backends that can verify draft tokens without a GPU; they call our sgl_kernel.
    "--prefill-attention-backend", "intel_amx", "--decode-attention-backend", "intel_amx",
    "--disable-cuda-graph", "--skip-server-warmup", "--grammar-backend", "none",
    # A share of the machine's memory; the default leaves nothing for other processes.
    "--mem-fraction-static", "0.3", "--max-total-tokens", "8192", "--max-running-requests", "4",
)  # fmt: skip
OWN_FLAGS = {
    "--model-path": "--target", "--model": "--target", "--dtype": "--dtype", "--tp-size": "--tp-size",
    "--tensor-parallel-size": "--tp-size", "--tp": "--tp-size", "--host": "--host", "--port": "--port",
    "--device": "--device", "--trust-remote-code": "--trust-remote-code", "--speculative-algorithm": "--algorithm",
    "--speculative-draft-model-path": "--draft", "--speculative-draft-model": "--draft",
    "--speculative-num-steps": "--num-steps", "--speculative-eagle-topk": "--topk",
    "--speculative-num-draft-tokens": "--num-draft-tokens",
    "--speculative-use-rejection-sampling": "--rejection-sampling", "--cuda-graph-max-bs": "--cuda-graph-max-bs",
    "--cuda-graph-max-bs-decode": "--cuda-graph-max-bs",
}  # fmt: skip
"""SGLang flags that have an option here: after ``--`` they would occur twice in the command."""
SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")


@dataclass(frozen=True)
class ServeOptions:
    """All options of the command."""

    draft: Path
    """The checkpoint's ``model/``."""
    target: str
    """Directory or hub name of the target."""
    algorithm: str
    dtype: str
    speculative: SpeculativeSettings
    device: str = "cuda"
    """cuda: the accelerator that SGLang finds; or cpu."""
    tp_size: int = 1
    host: str = "127.0.0.1"
    port: int = 30000
    trust_remote_code: bool = False
    sglang_version: str = field(default_factory=lambda: installed_version() or NEWEST)
    """The version that the command is for."""
    cuda_graph_max_bs: int | None = None
    """The largest batch whose decoding is captured in a CUDA graph; None is SGLang's choice."""
    rejection_sampling: bool = False
    """Whether draft tokens are sampled, and accepted by rejection sampling."""
    extra: tuple[str, ...] = ()
    """Flags that are passed to SGLang unchanged."""

    def __post_init__(self) -> None:
        require_supported(self.sglang_version)
        _check_speculative(self.speculative)
        cpu, topk, graphs = self.device == "cpu", self.speculative.topk, self.cuda_graph_max_bs
        if self.rejection_sampling:
            _require(topk == 1, f"--rejection-sampling is for chains, and top-k is {topk}: add --topk 1")
            _require(not cpu, "--rejection-sampling with --device cpu: it takes the likeliest token only")
        _require(graphs is None or graphs >= 1, f"--cuda-graph-max-bs is {graphs}: it must be at least 1")
        _require(graphs is None or not cpu, "--cuda-graph-max-bs with --device cpu: it has none; leave it out")
        _require(self.tp_size >= 1, f"--tp-size is {self.tp_size}: it must be at least 1")
        _require(0 < self.port < 65536, f"--port is {self.port}: expected 1 to 65535")
        for word in (word.split("=")[0] for word in self.extra):
            _require(word not in OWN_FLAGS, f"{word} after --: give it as {OWN_FLAGS.get(word)}, before the --")
        serve_flags(self)  # raises where the version has no flag for an option

    @property
    def api_key(self) -> str | None:
        """The key that SGLang will require from clients, if one is set after ``--``."""
        splits = (word.split("=", 1) if word.startswith("--api-key=") else [word] for word in self.extra)
        words = [part for split in splits for part in split]
        return dict(pairwise(words)).get("--api-key")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)


def _check_speculative(settings: SpeculativeSettings) -> None:
    steps, topk, tokens = settings.num_steps, settings.topk, settings.num_draft_tokens
    for name, value in (("--num-steps", steps), ("--topk", topk), ("--num-draft-tokens", tokens)):
        _require(type(value) is int and value >= 1, f"{name} is {value!r}: expected a whole number, at least 1")
    _require(
        topk > 1 or tokens == steps + 1,
        f"--num-draft-tokens is {tokens}: with top-k 1 it is --num-steps + 1 = {steps + 1}; leave it out",
    )
    least, most = smallest_tree(topk), largest_tree(steps, topk)
    _require(
        least <= tokens <= most,
        f"--num-draft-tokens is {tokens}: a tree of {steps} steps and top-k {topk} has {least} to {most} nodes",
    )


def from_checkpoint(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ServeOptions:
    """The options recorded in the checkpoint at ``path``, with ``overrides``.

    Args:
        path: a run directory, a ``step_<N>`` directory or its ``model/``.
        overrides: ``target``, ``algorithm``, ``num_steps``, ``topk``, ``num_draft_tokens`` and the other fields of
            :class:`ServeOptions`; None keeps the recorded value.  Where only ``num_steps`` or ``topk`` is given,
            ``num_draft_tokens`` becomes steps * top-k + 1: all of the chain, or as many nodes as a full beam.

    Raises:
        UserError: there is no usable checkpoint, an override contradicts it, or the version of SGLang cannot serve it.
    """
    values = {key: value for key, value in (overrides or {}).items() if value is not None}
    model = Path(os.path.abspath(find_model(path)))
    check_not_truncated(model)
    recorded, shape, provenance = read_recorded_settings(model)
    algorithm = values.pop("algorithm", recorded)
    _require(algorithm == recorded, f"--algorithm is {algorithm}: {model} is a checkpoint for {recorded}; leave it out")
    changes = {name: values.pop(name) for name in asdict(provenance.speculative) if name in values}
    speculative = replace(provenance.speculative, **changes)
    if changes and "num_draft_tokens" not in changes:
        tokens = default_draft_tokens(speculative.num_steps, speculative.topk)
        speculative = replace(speculative, num_draft_tokens=tokens)
    target = str(values.pop("target", provenance.target))
    _require(bool(target), "--target is empty: expected a directory or a hub name")
    directory = Path(target).expanduser()
    # The stand-in kernels are tested in float32 only.
    dtype = "float32" if values.get("device") == "cpu" else provenance.target_dtype
    options = ServeOptions(
        draft=model,
        target=os.path.abspath(directory) if directory.is_dir() else target,
        algorithm=algorithm,
        speculative=speculative,
        **{"dtype": dtype, **values},
    )
    check_servable(shape, options.sglang_version, "--sglang-version")
    entries = getattr(shape, "draft_vocab_size", None) or shape.vocab_size
    _require(
        not options.rejection_sampling or entries == shape.vocab_size,
        f"--rejection-sampling: the draft has {entries} of the target's {shape.vocab_size} tokens, and SGLang compares "
        "probabilities of all of them: leave it out, or train with draft.vocab_size=full",
    )
    return options


def read_recorded_settings(model: Path) -> tuple[str, DraftShape, Provenance]:
    """SGLang's name of the algorithm, the draft's shape and provenance, as the checkpoint in ``model`` records them.

    Raises UserError if its ``config.json`` is malformed.
    """
    config, file = read_config(model), model / "config.json"
    try:
        contract, shape = shape_of(config, file)
        provenance = provenance_of(config, model)
    except (AttributeError, TypeError) as error:  # a value of another type than its field has
        raise UsageError(f"{file}: malformed ({error}); expected a checkpoint written by this project") from None
    try:
        _check_speculative(provenance.speculative)
    except UsageError as error:
        raise UsageError(f"{file}: malformed speculative settings: {error}") from None
    for name in ("target", "target_dtype"):
        value = getattr(provenance, name)
        _require(isinstance(value, str) and bool(value), f"{file}: malformed, {name} is {value!r}, expected a text")
    return contract.algorithm, shape, provenance


def check_target(options: ServeOptions, variant: bool = False) -> None:
    """Raises UserError if a directory holds another model than the draft was trained for; accepts any hub name.

    Args:
        variant: accept other weights of the same shape, such as a quantized copy.
    """
    directory = Path(options.target)
    if not directory.is_dir():
        return
    _, shape, provenance = read_recorded_settings(options.draft)
    sizes = _target_sizes(directory, options.trust_remote_code)
    expected = {"hidden_size": getattr(shape, "target_hidden_size", shape.hidden_size), "vocab_size": shape.vocab_size}
    differences = [f"{key} is {sizes[key]}, expected {value}" for key, value in expected.items() if sizes[key] != value]
    # SGLang captures a layer's output as the input of the next one.
    min_layers = max(getattr(shape, "aux_layers", (-2,))) + 2
    if sizes["num_hidden_layers"] < min_layers:
        differences.append(f"num_hidden_layers is {sizes['num_hidden_layers']}, expected at least {min_layers}")
    _require(
        not differences,
        f"--target {directory}: not the model that {options.draft} was trained for ({'; '.join(differences)}); give "
        f"that one, recorded as {provenance.target}",
    )
    fingerprint = target_fingerprint(directory)
    _require(
        variant or fingerprint == provenance.target_fingerprint,
        f"--target {directory}: its configuration or weights are not those that {options.draft} was trained for "
        f"(fingerprint {provenance.target_fingerprint}, found {fingerprint}); give that model, or add --target-variant "
        "if this is a copy of it, such as a quantized one",
    )


def _target_sizes(directory: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Sizes of the (text) model in ``directory``.

    Read from ``config.json`` itself where it states them under these names; transformers, which is slow to import,
    resolves the other cases (defaults, other names, nested configurations).
    """
    with suppress(UserError):  # transformers states the reason
        config = read_config(directory)
        nested = any(isinstance(value, dict) and "hidden_size" in value for value in config.values())
        if not nested and all(type(config.get(key)) is int for key in SIZES):
            return {key: config[key] for key in SIZES}
    from nemo_speculative.targets.describe import text_config

    resolved = text_config(directory, trust_remote_code)
    return {key: getattr(resolved, key) for key in SIZES}


def serve_command(options: ServeOptions, python: str = "python") -> list[str]:
    """The command as a list of words."""
    return [python, "-m", "sglang.launch_server", *serve_flags(options)]


def serve_flags(options: ServeOptions) -> list[str]:
    """The flags for SGLang's own parser; raises UsageError if its version has no flag for an option."""
    words = []
    for name, value in _settings(options).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    if options.tp_size > 1:
        words += ["--tp-size", str(options.tp_size)]
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    if options.cuda_graph_max_bs is not None:
        words += [flag("--cuda-graph-max-bs", options.sglang_version), str(options.cuda_graph_max_bs)]
    if options.rejection_sampling:
        words.append(flag("--rejection-sampling", options.sglang_version))
    if options.device == "cpu":
        words += [flag("--device cpu", options.sglang_version), "cpu", *CPU_FLAGS]
    return [*words, *options.extra]


def _settings(options: ServeOptions) -> dict[str, Any]:
    """The settings that every command has, by their name in SGLang."""
    return {
        "model_path": options.target,
        "speculative_algorithm": options.algorithm,
        "speculative_draft_model_path": str(options.draft),
        "speculative_num_steps": options.speculative.num_steps,
        "speculative_eagle_topk": options.speculative.topk,
        "speculative_num_draft_tokens": options.speculative.num_draft_tokens,
        "dtype": options.dtype,
        "host": options.host,
        "port": options.port,
    }


def parsed_settings(options: ServeOptions) -> dict[str, Any]:
    """Dry run: the settings that matter to a draft, as SGLang's own parser reads them from the command.

    Raises UsageError if SGLang cannot be imported, refuses the command, or reads another value than was meant.
    """
    try:
        parsed = parse_flags(serve_flags(options), "the command")
    except ImportError as error:
        raise UsageError(f"SGLang cannot be imported ({error}); install it as docs/serving.md says") from None
    settings = {**_settings(options), "tp_size": options.tp_size, "trust_remote_code": options.trust_remote_code}
    for name, expected in settings.items():
        value = getattr(parsed, name)
        _require(
            value == expected,
            f"SGLang reads {name} as {value!r}, and {expected!r} was meant: look after -- for a flag that it takes for "
            "this one",
        )
    return settings


def serve_environment(options: ServeOptions) -> dict[str, str]:
    """The environment variables that the command needs in addition to those already set."""
    if options.device != "cpu":
        return {}
    path = os.pathsep.join(filter(None, (str(CPU_ENGINE), os.environ.get("PYTHONPATH"))))
    return {**CPU_ENVIRONMENT, "PYTHONPATH": path}


def shell_line(options: ServeOptions) -> str:
    """The command as one line to paste into a shell, preceded by the environment variables that it needs.

    It starts with this Python where SGLang is installed in it, else with ``python``.
    """
    python = sys.executable if sglang_installed() else "python"
    assignments = [f"{name}={shlex.quote(value)}" for name, value in serve_environment(options).items()]
    return " ".join([*assignments, shlex.join(serve_command(options, python))])


def sglang_command(model_dir: Path) -> str:
    """The line that serves the checkpoint in ``model_dir`` on an accelerator, with its recorded settings."""
    # The version installed for training does not matter: no flag of this line differs between versions.
    return shell_line(from_checkpoint(model_dir, {"sglang_version": NEWEST}))


def sglang_installed() -> bool:
    """Whether this Python can start SGLang; a mere directory of that name does not count."""
    spec = find_spec("sglang")
    return spec is not None and spec.has_location
