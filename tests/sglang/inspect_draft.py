"""What SGLang makes of a command and of the draft that it names; run with the command's environment, prints JSON.

    python inspect_draft.py [--load] FLAG ...

``settings``: the flags as SGLang's own parser reads them.  With --load also what SGLang's own class does with the
draft's tensors, which it does without a word: every parameter is NaN before, so ``unfilled`` names those that no tensor
filled whole, and ``ignored`` the tensors that, loaded alone, change nothing.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from sglang.benchmark.one_batch import _init_process_global_configs
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import SpawnRanks, get_device, publish, spawn_world_rank
from sglang.srt.server_args import PortArgs, ServerArgs, prepare_server_args

SETTINGS = (
    "model_path", "speculative_algorithm", "speculative_draft_model_path", "speculative_num_steps",
    "speculative_eagle_topk", "speculative_num_draft_tokens", "dtype", "host", "port", "tp_size", "trust_remote_code",
)  # fmt: skip


def start_engine(args: ServerArgs) -> None:
    """The process-wide state without which SGLang's layers cannot be built."""
    args.resolve_once()
    rank = spawn_world_rank(args, tp_rank=0, pp_rank=0)
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
    _init_process_global_configs()
    port = PortArgs.init_new(args).nccl_port
    bootstrap.init_parallel_runtime(server_args=args, device=get_device().device, dist_port=port)
    bootstrap.init_layer_runtime(model_config=ModelConfig.from_server_args(args))


class PoisonedDraft:
    """SGLang's draft model, whose every value is NaN until it is loaded."""

    def __init__(self, args: ServerArgs, directory: str):
        config = ModelConfig.from_server_args(args, model_path=directory, is_draft_model=True).hf_config
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


def load_report(args: ServerArgs) -> dict[str, object]:
    start_engine(args)
    directory = args.speculative_draft_model_path
    draft, tensors = PoisonedDraft(args, directory), load_file(Path(directory) / "model.safetensors")
    ignored = []
    for name, tensor in tensors.items():
        draft.load({name: tensor})
        if draft.untouched():
            ignored.append(name)
    draft.load(tensors)
    ids = draft.model.hot_token_id
    return {"architecture": draft.architecture, "unfilled": draft.unfilled(), "ignored": ignored, "ids": ids.tolist()}


def main(flags: list[str]) -> None:
    load = flags[:1] == ["--load"]
    args = prepare_server_args(flags[load:])
    report: dict[str, object] = {"settings": {name: getattr(args, name) for name in SETTINGS}}
    if load:
        report |= load_report(args)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
