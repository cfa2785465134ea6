"""The servers of a benchmark: started for it, or already running."""

import asyncio
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from nemo_speculative.checkpoint.metadata import find_model
from nemo_speculative.config.schema import BenchmarkJob
from nemo_speculative.evaluation.server_benchmark.results import accelerator, digest, setting_name
from nemo_speculative.serving.client import Client
from nemo_speculative.serving.command import (
    ServeOptions,
    check_target,
    from_checkpoint,
    serve_command,
    serve_environment,
)
from nemo_speculative.serving.server import Server, require_free
from nemo_speculative.targets.fingerprint import target_fingerprint
from nemo_speculative.utils.errors import UsageError, UserError
from nemo_speculative.utils.http import api_key

REPORTED = ("model_path", "version", "dtype", "tp_size", "dp_size", "attention_backend", "quantization")
"""Settings of a running server that metrics depend on, in addition to the speculative ones."""
VOLATILE = frozenset({
    "internal_states", "startup_time", "status", "launch_command", "kv_events", "random_seed", "host", "dist_init_addr",
    "max_total_num_tokens", "max_req_input_len",
})  # fmt: skip
"""Fields of ``/server_info`` that are not settings, or differ at each start."""


@dataclass(frozen=True)
class BenchServer:
    """A server with one speculative setting."""

    server: dict[str, Any]
    """Identity that it shares with its baseline; see :attr:`.results.BenchPoint.server`."""
    draft: dict[str, Any] | None
    """The draft and its settings; None: a baseline."""
    target: str
    """Directory or hub name of its target, which holds the tokenizer."""
    running: Callable[[], AbstractContextManager[str]]
    """The server's URL for a block in which it runs.  Raises ServerError if it does not start."""


def servers_of(job: BenchmarkJob) -> list[BenchServer]:
    """All servers that ``job`` measures, the baseline first.

    Raises UserError if not exactly one of checkpoint and url is set, one is unusable, or a setting is impossible.
    """
    if (job.checkpoint is None) == (job.url is None):
        raise UsageError(
            "checkpoint and url: expected one of them, checkpoint=RUN to start a server or url=http://HOST:PORT"
        )
    return _running_servers(job) if job.url else _launched_servers(job)


def _launched_servers(job: BenchmarkJob) -> list[BenchServer]:
    python = job.server.python or sys.executable
    version, model = _sglang_version(python), find_model(job.checkpoint or "")
    with (model / "model.safetensors").open("rb") as weights:
        weights_digest = hashlib.file_digest(weights, "sha256").hexdigest()[:16]
    Path(job.results).mkdir(parents=True, exist_ok=True)
    servers: list[BenchServer] = []
    for setting in job.sweep or [[]]:
        options = _options(job, setting, version)
        command = serve_command(options, python)
        common, speculative = split(command)
        _, _, _, *flags = common  # python -m sglang.launch_server
        identity = {
            "target": _fingerprint(options.target), "sglang": version, "flags": without(flags, "--port"),
            "accelerator": accelerator(),
        }  # fmt: skip
        draft = {
            "weights": weights_digest, "speculative": asdict(options.speculative),
            "flags": without(speculative, "--speculative-draft-model-path"),
        }  # fmt: skip
        if job.baseline and not servers:
            running = partial(_launched, options, job, common, setting_name(None))
            servers.append(BenchServer(identity, None, options.target, running))
        running = partial(_launched, options, job, command, setting_name(options.speculative))
        servers.append(BenchServer(identity, draft, options.target, running))
    return servers


@contextmanager
def _launched(options: ServeOptions, job: BenchmarkJob, command: Sequence[str], setting: str) -> Iterator[str]:
    """Starts a server, and stops it at the end of the block."""
    require_free(options.host, options.port, f"server.port={options.port}")
    logs = (Path(job.results) / f"server-{setting}-{n}.log" for n in count(1))
    log = next(file for file in logs if not file.exists())
    with Server(command, serve_environment(options), options.host, options.port, log) as server:
        server.wait_until_healthy(job.server.timeout)
        yield server.url


def _options(job: BenchmarkJob, setting: Sequence[int], version: str) -> ServeOptions:
    server = job.server
    speculative = {"num_steps": job.num_steps, "topk": job.topk, "num_draft_tokens": job.num_draft_tokens}
    if setting:
        speculative = dict(zip(speculative, setting, strict=False))
    overrides = {
        "target": job.target, "dtype": server.dtype, "device": server.device, "tp_size": server.tp_size,
        "port": server.port, "trust_remote_code": server.trust_remote_code, "extra": tuple(server.flags),
        "sglang_version": version,
    }  # fmt: skip
    try:
        options = from_checkpoint(job.checkpoint or "", {**overrides, **speculative})
    except UsageError as error:
        raise UsageError(f"sweep={list(setting)}: {error}" if setting else str(error)) from None
    if options.api_key:
        raise UsageError("server.flags: --api-key would be written into the results; leave it out, or use url=")
    try:
        check_target(options, server.target_variant)
    except UserError as error:
        raise UsageError(f"{error} (here: target=, server.target_variant=true)") from None
    return options


def _fingerprint(target: str) -> str:
    """Fingerprint of a directory's contents; a hub name as it is."""
    return target_fingerprint(Path(target)) if (Path(target) / "config.json").is_file() else target


def _sglang_version(python: str) -> str:
    """The version of SGLang in the environment of ``python``; raises UsageError if it is not installed there."""
    try:
        program = [python, "-c", "from importlib.metadata import version; print(version('sglang'))"]
        return subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise UsageError(
            f"server.python: {python} has no SGLang; give the python of an environment that does (docs/serving.md), or "
            "url= for a running server"
        ) from None


def split(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command without its speculative flags, and these flags with their values."""
    common: list[str] = []
    speculative: list[str] = []
    words = common
    for word in command:
        if word.startswith("--"):
            words = speculative if word.startswith("--speculative-") else common
        words.append(word)
    return common, speculative


def without(words: Sequence[str], flag: str) -> list[str]:
    """``words`` without ``flag`` and its value."""
    return [word for before, word in zip(["", *words], words, strict=False) if flag not in (before, word)]


def _running_servers(job: BenchmarkJob) -> list[BenchServer]:
    if job.sweep or job.num_steps or job.topk or job.num_draft_tokens or job.write_back:
        raise UsageError(
            "url: the settings of a running server are its own; leave out sweep, num_steps, topk, num_draft_tokens and "
            "write_back, or give checkpoint= in its place"
        )
    urls = [url for url in (job.baseline_url, job.url) if url is not None]
    infos = [asyncio.run(_server_info(url)) for url in urls]
    base, own = infos[0], infos[-1]
    if job.baseline_url and base.get("speculative_algorithm"):
        raise UserError(f"baseline_url: {job.baseline_url} speculates; expected a server without a draft")
    for name in REPORTED:
        if base.get(name) != own.get(name):
            raise UserError(
                f"baseline_url: {name} of {urls[0]} is {base.get(name)}, expected {own.get(name)} as of {urls[-1]}; "
                "start both with the same flags but for the draft"
            )
    identity = {
        "urls": [job.baseline_url, job.url], **{name: own.get(name) for name in REPORTED},
        "target": _fingerprint(str(own.get("model_path"))), "settings": [settings_digest(info) for info in infos],
    }  # fmt: skip
    return [
        BenchServer(
            identity,
            _draft(info),
            str(job.target or info["tokenizer_path"] or info["model_path"]),
            partial(_already_running, url),
        )
        for url, info in zip(urls, infos, strict=True)
    ]


@contextmanager
def _already_running(url: str) -> Iterator[str]:
    yield url


async def _server_info(url: str) -> dict[str, Any]:
    async with Client(url, api_key()) as client:
        return await client.server_info()


def settings_digest(info: Mapping[str, Any]) -> str:
    """Digest of the fields of ``/server_info`` that are the same when the server is started again."""
    return digest({name: value for name, value in info.items() if name not in VOLATILE and not name.endswith("port")})


def _draft(info: Mapping[str, Any]) -> dict[str, Any] | None:
    if not info.get("speculative_algorithm"):
        return None
    names = {"num_steps": "num_steps", "topk": "eagle_topk", "num_draft_tokens": "num_draft_tokens"}
    return {
        "weights": _fingerprint(str(info.get("speculative_draft_model_path"))),
        "speculative": {option: info.get(f"speculative_{field}") for option, field in names.items()},
        "flags": [info["speculative_algorithm"]],
    }
