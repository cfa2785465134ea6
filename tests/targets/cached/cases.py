"""Small documents, captures and losses for tests."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_speculative.algorithms.eagle.network import EagleDraft
from nemo_speculative.algorithms.eagle.training import EagleObjective
from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.algorithms.eagle3.training import Eagle3Objective
from nemo_speculative.config.schema import Eagle3DraftConfig, EagleDraftConfig, FeatureNoise, MaskConvention
from nemo_speculative.data.batch import collate, pack
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.vocab_mapping import VocabMapping
from nemo_speculative.targets.cached.manifest import Manifest
from nemo_speculative.targets.cached.store import Budget, FeatureStore, prepare_directory, seal
from nemo_speculative.targets.cached.target import FeaturesTarget
from nemo_speculative.training.capture_features import run

ROW, VOCAB = 96, 300
SERVING = MaskConvention.serving


@dataclass
class Algorithm:
    """A draft algorithm with its configuration."""

    config: Eagle3DraftConfig | EagleDraftConfig
    draft: type
    objective: type
    aux_layers: list[int] | None

    @property
    def name(self) -> str:
        return f"{self.draft.__module__}.{self.draft.__name__}"

    def make_draft(self, target):
        torch.manual_seed(0)
        draft = self.draft(self.draft.shape_for(self.config, target.config, target.aux_layers, VOCAB)).attach(target)
        draft.set_vocab_mapping(VocabMapping(torch.arange(VOCAB), VOCAB, 1.0))
        return draft

    def make_objective(self, target):
        return self.objective(target, self.config, seed=0, tau_steps=2)


def eagle3(convention=SERVING):
    return Algorithm(Eagle3DraftConfig(ttt_steps=3, mask_convention=convention), Eagle3Draft, Eagle3Objective, None)


def eagle1(convention=SERVING):
    config = EagleDraftConfig(ttt_steps=2, mask_convention=convention, noise=FeatureNoise.paper)
    return Algorithm(config, EagleDraft, EagleObjective, [])


def make_documents(count=14, seed=0):
    """Random prompts and answers, some of several turns, one with a single supervised token."""
    draw = random.Random(seed)
    documents = []
    for n in range(count):
        length = draw.randrange(4, 40)
        mask = [3 <= t < length - 2 and t % 11 > 1 for t in range(length)]
        mask[2] |= not any(mask)
        documents.append(TokenRow(f"c{n}", [draw.randrange(5, VOCAB) for _ in range(length)], mask, f"file:{n}"))
    return documents


def batches_of(documents, seed=0, rows=2, row_tokens=ROW):
    packed = pack([len(d.input_ids) for d in documents], row_tokens, seed)
    return [
        collate([[documents[d] for d in row] for row in packed[n : n + rows]], row_tokens, pad_id=1)
        for n in range(0, len(packed), rows)
    ]


def capture_into(directory: Path, target, documents, algorithm, *, encoding=None, megabytes=1, seal_it=True):
    """Captures ``documents`` into ``directory`` and returns it."""
    manifest = Manifest.of(target, algorithm.config.mask_convention, algorithm.name, encoding)
    directory.mkdir(parents=True, exist_ok=True)
    manifest = prepare_directory(directory, manifest)
    budget = Budget(FeatureStore(directory, manifest), documents)
    run(target, documents, budget, directory, row_tokens=ROW, rows=3, megabytes=megabytes)
    if seal_it:
        seal(directory)
    return directory


def reading(target_dir, directory, algorithm, **settings) -> FeaturesTarget:
    return FeaturesTarget(
        target_dir, directory=str(directory), mask_convention=algorithm.config.mask_convention, draft=algorithm.name,
        aux_layers=algorithm.aux_layers, **settings,
    )  # fmt: skip


def loss_of(algorithm, target, batches, change=lambda batch, output: output):
    """Loss and gradients of a global batch."""
    draft, goal = algorithm.make_draft(target), algorithm.make_objective(target)
    schedules = [goal.schedule(batch) for batch in batches]
    counts = sum(schedule.counts for schedule in schedules)
    total = 0.0
    for schedule in schedules:
        out = goal.loss(draft, schedule, change(schedule.batch, target.compute_hidden_states(schedule.batch)), counts)
        out.loss.backward()
        total += float(out.loss.detach())
    return total, {name: p.grad.clone() for name, p in draft.named_parameters()}


def assert_same(result, expected, tolerance=0.0):
    """Asserts that losses and gradients agree, relative to their size."""
    assert abs(result[0] - expected[0]) <= tolerance * abs(expected[0]), (result[0], expected[0])
    for name, gradient in expected[1].items():
        error = float((result[1][name] - gradient).norm())
        assert error <= tolerance * float(gradient.norm()), f"{name}: {error}"
