"""Commands and drafts as SGLang reads them, in one SGLang process; run with the CPU command's environment.

    python -m tests.sglang.inspect_drafts WANTED.json      (prints JSON)

``WANTED.json`` holds two objects.  ``commands`` are flags by name, reported as SGLang's own parser reads them.
``drafts`` are directories of checkpoints by name.  Reported is what SGLang's own class does with their tensors, which
it does without a word: every parameter is NaN before, so ``unfilled`` names those that no tensor filled whole, and
``ignored`` the tensors that, loaded alone, change nothing.  Where ``given.safetensors`` is stored next to a checkpoint,
SGLang's computation is left there too, see :mod:`tests.sglang.replay`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sglang.benchmark.one_batch import _init_process_global_configs
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import SpawnRanks, get_device, publish, spawn_world_rank
from sglang.srt.server_args import PortArgs, ServerArgs, prepare_server_args

from tests.sglang.replay import replay

SETTINGS = (
    "model_path", "speculative_algorithm", "speculative_draft_model_path", "speculative_num_steps",
    "speculative_eagle_topk", "speculative_num_draft_tokens", "dtype", "host", "port", "tp_size", "trust_remote_code",
)  # fmt: skip


def start_engine(args: ServerArgs) -> None:
    """Sets up the process-wide state that SGLang's layers need."""
    args.resolve_once()
    rank = spawn_world_rank(args, tp_rank=0, pp_rank=0)
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
    _init_process_global_configs()
    port = PortArgs.init_new(args).nccl_port
    bootstrap.init_parallel_runtime(server_args=args, device=get_device().device, dist_port=port)
    bootstrap.init_layer_runtime(model_config=ModelConfig.from_server_args(args))


class PoisonedDraft:
    """SGLang's draft model with all values NaN before loading."""

    def __init__(self, args: ServerArgs, directory: Path):
        config = ModelConfig.from_server_args(args, model_path=str(directory), is_draft_model=True).hf_config
        model_class, self.architecture = ModelRegistry.resolve_model_cls(config.architectures)
        self.model = model_class(config)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        self.model.hot_token_id = None
        for parameter in self.model.parameters():
            parameter.data.fill_(float("nan"))
        self.model.load_weights(iter(tensors.items()))

    def unfilled(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.isnan().any()]

    def untouched(self) -> bool:
        return self.model.hot_token_id is None and all(p.isnan().all() for p in self.model.parameters())


def inspect(args: ServerArgs, directory: Path) -> dict[str, Any]:
    """SGLang's reading of the checkpoint in ``directory``."""
    draft, tensors = PoisonedDraft(args, directory), load_file(directory / "model.safetensors")
    ignored = []
    for name, tensor in tensors.items():
        draft.load({name: tensor})
        if draft.untouched():
            ignored.append(name)
    draft.load(tensors)
    ids = draft.model.hot_token_id
    report = {"architecture": draft.architecture, "unfilled": draft.unfilled(), "ignored": ignored}
    if (directory.parent / "given.safetensors").is_file():
        replay(draft.model, directory)
    return {**report, "ids": None if ids is None else ids.tolist()}


def main(file: str) -> None:
    wanted = json.loads(Path(file).read_text())
    commands = {name: prepare_server_args(flags) for name, flags in wanted["commands"].items()}
    settings = {name: {key: getattr(args, key) for key in SETTINGS} for name, args in commands.items()}
    first = next(iter(commands.values()))
    start_engine(first)
    drafts = {name: inspect(first, Path(directory)) for name, directory in wanted["drafts"].items()}
    print(json.dumps({"commands": settings, "drafts": drafts}))


if __name__ == "__main__":
    main(sys.argv[1])
