"""The command that serves a checkpoint with SGLang, derived from what the checkpoint remembers.

An EAGLE-3 draft served under another algorithm, or beside another target, accepts nothing and says nothing; so target,
algorithm, dtype and speculative settings are read from ``config.json`` and never typed.  Needs neither SGLang nor the
target, and touches nothing.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_speculative.checkpoint.contract import shape_of
from nemo_speculative.checkpoint.draft_checkpoint import Provenance, check_whole, find_model, provenance_of, read_config
from nemo_speculative.config.speculative import SpeculativeSettings, default_draft_tokens, largest_tree, smallest_tree
from nemo_speculative.serving.versions import NEWEST, check_servable, default_version, flag, require_supported
from nemo_speculative.utils.errors import UsageError

CPU_ENGINE = Path(__file__).parent / "cpu"
CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
"""One thread: on a model that a CPU can serve, more only wait for each other.  Not compiled: that takes a C++ compiler,
and the first answer 16 s instead of 0.3 s (embedded target, 2 cores)."""
CPU_FLAGS = (
    # The only backends that can verify draft tokens without a GPU; they call our sgl_kernel.
    "--prefill-attention-backend", "intel_amx", "--decode-attention-backend", "intel_amx",
    "--disable-cuda-graph", "--skip-server-warmup", "--grammar-backend", "none",
    # Of the machine's memory; the default leaves nothing for the rest of it.
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
"""SGLang's flags that have an option of ours: given behind ``--`` they would be on the command twice."""


@dataclass(frozen=True)
class ServeOptions:
    """Everything that the command says."""

    draft: Path
    """The checkpoint's ``model/``."""
    target: str
    """A directory or a hub name."""
    algorithm: str
    dtype: str
    speculative: SpeculativeSettings
    device: str = "cuda"
    """cuda, or whatever accelerator SGLang finds; or cpu."""
    tp_size: int = 1
    host: str = "127.0.0.1"
    port: int = 30000
    trust_remote_code: bool = False
    sglang_version: str = field(default_factory=default_version)
    """The version that the command is for."""
    cuda_graph_max_bs: int | None = None
    """The largest batch whose decoding is captured in a CUDA graph; None is SGLang's choice."""
    rejection_sampling: bool = False
    """Whether drafts are sampled, and verified by their probabilities."""
    extra: tuple[str, ...] = ()
    """Flags that go to SGLang as they are."""

    def __post_init__(self) -> None:
        require_supported(self.sglang_version)
        _check_speculative(self.speculative)
        self._check_sampling()
        graphs = self.cuda_graph_max_bs
        _require(graphs is None or graphs >= 1, f"--cuda-graph-max-bs is {graphs}: it must be at least 1")
        _require(
            graphs is None or self.device != "cpu", "--cuda-graph-max-bs with --device cpu: it has none; leave it out"
        )
        _require(self.tp_size >= 1, f"--tp-size is {self.tp_size}: it must be at least 1")
        _require(0 < self.port < 65536, f"--port is {self.port}: expected 1 to 65535")
        for word in (word.split("=")[0] for word in self.extra):
            _require(word not in OWN_FLAGS, f"{word} stands behind --: give it as {OWN_FLAGS.get(word)}, before the --")
        serve_flags(self)  # the version has a name for each of them

    def _check_sampling(self) -> None:
        if self.rejection_sampling:
            topk = self.speculative.topk
            _require(topk == 1, f"--rejection-sampling is for chains, and top-k is {topk}: add --topk 1")
            _require(self.device != "cpu", "--rejection-sampling with --device cpu: it takes the likeliest token only")

    @property
    def api_key(self) -> str | None:
        """What SGLang is told behind ``--`` to ask every client for."""
        given = dict(zip(self.extra, self.extra[1:], strict=False))
        joined = (word.removeprefix("--api-key=") for word in self.extra if word.startswith("--api-key="))
        return next(joined, given.get("--api-key"))


@dataclass(frozen=True)
class Remembered:
    """What a checkpoint's ``config.json`` says of how it is served."""

    algorithm: str
    """SGLang's name."""
    shape: Any
    provenance: Provenance


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)


def _check_speculative(values: SpeculativeSettings) -> None:
    steps, topk, tokens = values.num_steps, values.topk, values.num_draft_tokens
    for name, value in (("--num-steps", steps), ("--topk", topk), ("--num-draft-tokens", tokens)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole and value >= 1, f"{name} is {value!r}: expected a whole number, at least 1")
    if topk == 1:
        _require(
            tokens == steps + 1,
            f"--num-draft-tokens is {tokens}: with top-k 1 it is --num-steps + 1 = {steps + 1}; leave it out",
        )
    least, most = smallest_tree(topk), largest_tree(steps, topk)
    _require(
        least <= tokens <= most,
        f"--num-draft-tokens is {tokens}: a tree of {steps} steps and top-k {topk} has {least} to {most} nodes",
    )


def from_checkpoint(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ServeOptions:
    """The options that the checkpoint at ``path`` remembers, with ``overrides``.

    Args:
        path: a run directory, a ``step_<N>`` directory or its ``model/``.
        overrides: ``target``, ``algorithm``, ``num_steps``, ``topk``, ``num_draft_tokens`` and the other fields of
            :class:`ServeOptions`; None is "as remembered".  Where only ``num_steps`` or ``topk`` is given,
            ``num_draft_tokens`` follows as steps * top-k + 1: all of the chain, or as many nodes as a full beam.

    Raises:
        UserError: there is no checkpoint, its ``config.json`` is malformed, an override contradicts it, or the version
            of SGLang cannot serve it.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    model = Path(os.path.abspath(find_model(path)))
    check_whole(model)
    remembered = read_remembered(model)
    algorithm, provenance = remembered.algorithm, remembered.provenance
    wanted = given.pop("algorithm", algorithm)
    if wanted != algorithm:
        raise UsageError(f"--algorithm is {wanted}: {model} is a checkpoint for {algorithm}; leave it out")
    speculative = _merge(provenance.speculative, given)
    target = str(given.pop("target", provenance.target))
    _require(bool(target), "--target is empty: expected a directory or a hub name")
    directory = Path(target).expanduser()
    # The stand-in kernels are only judged in float32.
    dtype = "float32" if given.get("device") == "cpu" else provenance.target_dtype
    options = ServeOptions(
        draft=model,
        target=os.path.abspath(directory) if directory.is_dir() else target,
        algorithm=algorithm,
        speculative=speculative,
        **{"dtype": dtype, **given},
    )
    check_servable(remembered.shape, options.sglang_version, "--sglang-version")
    if options.rejection_sampling:
        _check_whole_vocabulary(remembered.shape)
    return options


def _check_whole_vocabulary(shape: Any) -> None:
    entries = getattr(shape, "draft_vocab_size", None) or shape.vocab_size
    _require(
        entries == shape.vocab_size,
        f"--rejection-sampling: the draft has {entries} of the target's {shape.vocab_size} tokens, and SGLang compares "
        "probabilities of all of them: leave it out, or train with draft.vocab_size=full",
    )


def read_remembered(model: Path) -> Remembered:
    """What the checkpoint in ``model`` remembers.

    Raises:
        UserError: its ``config.json`` is malformed.
    """
    config, file = read_config(model), model / "config.json"
    try:
        contract, shape = shape_of(config, file)
        remembered = provenance_of(config, model)
    except (AttributeError, TypeError) as error:  # a value of another type than its field has
        raise UsageError(f"{file}: malformed ({error}); expected a checkpoint written by this project") from None
    try:
        _check_speculative(remembered.speculative)
    except UsageError as error:
        raise UsageError(f"{file}: malformed speculative settings: {error}") from None
    for name in ("target", "target_dtype"):
        value = getattr(remembered, name)
        _require(isinstance(value, str) and bool(value), f"{file}: malformed, {name} is {value!r}, expected a text")
    return Remembered(contract.draft.ALGORITHM, shape, remembered)


def _merge(remembered: SpeculativeSettings, given: dict[str, Any]) -> SpeculativeSettings:
    """Takes the speculative settings out of ``given``."""
    changed = given.keys() & {"num_steps", "topk"}
    steps, topk = given.pop("num_steps", remembered.num_steps), given.pop("topk", remembered.topk)
    tokens = default_draft_tokens(steps, topk) if changed else remembered.num_draft_tokens
    # Before a derived number of draft tokens can be blamed for them.
    _require(steps >= 1, f"--num-steps is {steps}: it must be at least 1")
    _require(topk >= 1, f"--topk is {topk}: it must be at least 1")
    return SpeculativeSettings(steps, topk, given.pop("num_draft_tokens", tokens))


def serve_command(options: ServeOptions, python: str = "python") -> list[str]:
    """The command, word by word."""
    return [python, "-m", "sglang.launch_server", *serve_flags(options)]


def serve_flags(options: ServeOptions) -> list[str]:
    """What SGLang's own parser is given.

    Raises:
        UsageError: the version of SGLang has no flag for an option.
    """
    words = [
        "--model-path", options.target,
        "--speculative-algorithm", options.algorithm,
        "--speculative-draft-model-path", str(options.draft),
        "--speculative-num-steps", str(options.speculative.num_steps),
        "--speculative-eagle-topk", str(options.speculative.topk),
        "--speculative-num-draft-tokens", str(options.speculative.num_draft_tokens),
        "--dtype", options.dtype,
        "--host", options.host,
        "--port", str(options.port),
    ]  # fmt: skip
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


def serve_environment(options: ServeOptions) -> dict[str, str]:
    """The environment variables that the command needs beside those that are set."""
    if options.device != "cpu":
        return {}
    path = os.pathsep.join(filter(None, (str(CPU_ENGINE), os.environ.get("PYTHONPATH"))))
    return {**CPU_ENVIRONMENT, "PYTHONPATH": path}


def shell_line(options: ServeOptions) -> str:
    """The command as one line to paste into a shell, the environment that it needs in front.

    It names this Python where SGLang is installed beside it, else the ``python`` of the environment it is pasted in.
    """
    python = sys.executable if sglang_installed() else "python"
    assignments = [f"{name}={shlex.quote(value)}" for name, value in serve_environment(options).items()]
    return " ".join([*assignments, shlex.join(serve_command(options, python))])


def sglang_command(model_dir: Path) -> str:
    """The line that serves the checkpoint in ``model_dir`` on an accelerator, as it remembers to be served.

    Raises:
        UserError: it is not a checkpoint of this project.
    """
    # Not for the version beside this Python, which trains: no flag of this line differs.
    return shell_line(from_checkpoint(model_dir, {"sglang_version": NEWEST}))


def sglang_installed() -> bool:
    """Whether this Python can start SGLang; a mere directory of that name does not count."""
    spec = find_spec("sglang")
    return spec is not None and spec.has_location
