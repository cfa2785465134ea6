"""Models for the decoding tests: vocabularies so small that even a random draft guesses some tokens."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from nemo_speculative.algorithms.common.draft import Draft
from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.config.schema import DraftConfig, Eagle3DraftConfig, EagleDraftConfig
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.decoding.tree_builder import MC_SIM_7B_63, Chain, DynamicTree, StaticTree, TreeBuilder
from nemo_speculative.targets.hf import HFTarget
from tests.conftest import make_target

VOCAB_SIZE = 12
AUX_LAYERS = [0, 1, 2]
NO_STOP: frozenset[int] = frozenset()

DRAFTS: dict[str, tuple[type[Draft], DraftConfig]] = {
    "eagle": (EagleDraft, EagleDraftConfig()),
    "eagle of 2 layers": (EagleDraft, EagleDraftConfig(num_layers=2)),
    "eagle3": (Eagle3Draft, Eagle3DraftConfig()),
    "eagle3.1": (Eagle3Draft, Eagle3DraftConfig(fc_norm=True, norm_output=True)),
    "eagle3.1, one norm": (Eagle3Draft, Eagle3DraftConfig(norm_before_fc=True, norm_output=True)),
    "eagle3 of 2 layers": (Eagle3Draft, Eagle3DraftConfig(num_layers=2)),
}
TREE_BUILDERS: dict[str, TreeBuilder] = {
    "chain": Chain(4),
    "static": StaticTree(),
    "dynamic": DynamicTree(num_steps=4, topk=3, num_draft_tokens=12),
}


def small_target(directory: Path, **config) -> HFTarget:
    """A random Llama of 4 layers and 12 tokens."""
    values = {"num_layers": 4, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 64} | config
    return HFTarget(make_target(directory, **values), aux_layers=AUX_LAYERS)


def random_draft(kind: str, target: HFTarget, seed: int = 0, draft_vocab: int = 9) -> Draft:
    """A draft that was never trained; an EAGLE-3 draft has only some of the target's tokens."""
    torch.manual_seed(seed)
    network, config = DRAFTS[kind]
    draft = network(network.shape_for(config, target.config, target.aux_layers, draft_vocab)).attach(target)
    if isinstance(draft, Eagle3Draft):
        ids = torch.randperm(target.config.vocab_size)[:draft_vocab].sort().values
        draft.set_vocab_mapping(VocabMapping(ids, target.config.vocab_size, 1.0))
    for name, parameter in draft.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif "self_attn" in name:  # what it attends to must matter
            parameter.data.mul_(2)
    return draft.eval().requires_grad_(False)


def prompts(number: int, seed: int = 0, shortest: int = 2, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """Random prompts of five lengths."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (shortest + 3 * (n % 5),), generator=random).tolist() for n in range(number)]


def plain(
    target: HFTarget, questions: Sequence[Sequence[int]], limit: int, stop_ids: Collection[int] = NO_STOP
) -> list[list[int]]:
    """Greedy answers by transformers alone, recomputing the whole sequence for every token: no cache, no draft."""
    return _by_length(questions, lambda same: _plain(target, same, limit, stop_ids))


@torch.inference_mode()
def _plain(target, same: list[list[int]], limit: int, stop_ids: Collection[int]) -> list[list[int]]:
    tokens = torch.tensor(same)
    for _ in range(limit):
        best = target.model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, best), dim=1)
    answers = tokens[:, len(same[0]) :].tolist()
    ends = [next((i for i, t in enumerate(a) if t in stop_ids), limit) for a in answers]
    return [answer[: end + 1] for answer, end in zip(answers, ends, strict=True)]


def _by_length(questions: Sequence[Sequence[int]], answer: Callable[[list[list[int]]], list]) -> list:
    answers: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in questions}:
        numbers = [i for i, prompt in enumerate(questions) if len(prompt) == length]
        answers |= zip(numbers, answer([list(questions[i]) for i in numbers]), strict=True)
    return [answers[i] for i in range(len(questions))]


def tree_of(paths: Sequence[tuple[int, ...]] = MC_SIM_7B_63) -> list[int]:
    """Parents of the nodes of a static tree, the root's first, computed one by one."""
    nodes: list[tuple[int, ...]] = [(), *sorted(paths, key=lambda path: (len(path), path))]
    return [-1, *(nodes.index(path[:-1]) for path in nodes[1:])]
