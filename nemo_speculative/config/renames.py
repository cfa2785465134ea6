"""Option keys and class paths of earlier versions next to today's: an old key on the command line ends in one line with
the new one; a stored configuration is translated, so that a run of an earlier version resumes."""

from typing import Any

KEYS = {
    "draft.num_steps": "draft.ttt_steps",
    "data.row_tokens": "data.packed_length",
    "trainer.slots_alive": "trainer.ttt_chunk_slots",
    "backend.rest": "backend.backoff_seconds",
    "engine.patience": "engine.give_up_after",
}
PATHS = {
    "data.sources.load_jsonl": "data.conversations.load_jsonl",
    "data.sources.load_stdlib": "data.stdlib.load_stdlib",
    "drafts.eagle": "algorithms.eagle.network",
    "drafts.eagle3": "algorithms.eagle3.network",
    "features.target": "targets.cached.target",
    "objectives.eagle": "algorithms.eagle.training",
    "objectives.eagle3": "algorithms.eagle3.training",
    "objectives.losses": "algorithms.common.losses",
    "preparation.load": "prepare_data.load",
    "serving.sglang_target": "targets.sglang",
    "targets.remote": "targets.remote.client",
    "targets.sharded.ShardedTarget": "targets.sharded.FSDP2Target",
    "targets.tensor_parallel": "targets.sharded",
    "targets.tiny": "targets.demo",
    "training.loggers": "training.metrics",
    "training.optimization": "training.optimizer",
}
"""Modules of this package, and classes and functions whose name changed or whose module was divided."""


def translate(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``config``, as an earlier version stored it, with today's keys and class paths; its keys are below ``prefix``."""
    result = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = translate(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            value = current_class(value)
        result[KEYS.get(f"{prefix}{key}", key).rpartition(".")[2]] = value
    return result


def current_class(path: str) -> str:
    """Today's path of the class ``path``; any other string as it is."""
    package, _, rest = path.partition(".")
    module, _, name = rest.rpartition(".")
    if package != "nemo_speculative" or not module:
        return path
    return f"{package}.{PATHS.get(rest) or f'{PATHS.get(module, module)}.{name}'}"
