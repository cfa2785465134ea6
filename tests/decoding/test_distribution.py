"""Sampled answers of whole models have the target's distribution, which is small enough to be computed exactly."""

import pytest
import torch

from nemo_speculative.decoding.drafters import EagleDrafter, NgramDrafter, NoDrafter
from nemo_speculative.decoding.engine import generate
from nemo_speculative.decoding.tree_builder import Chain, DynamicTree, StaticTree
from nemo_speculative.decoding.verify import Rejection, Sampling, TargetOnly
from nemo_speculative.targets.hf import HFTarget
from tests.conftest import make_target
from tests.decoding.models import NO_STOP, random_draft
from tests.decoding.statistics import chi_square_p

DRAWS, BATCH, LEVEL = 20_000, 2000, 1e-3
V, TEMPERATURE = 5, 1.5
TREE = StaticTree(((0,), (1,), (0, 0), (1, 0), (0, 1)))
WAYS = {
    "target only, chain": (TargetOnly, Chain(2)),
    "target only, static": (TargetOnly, TREE),
    "target only, dynamic": (TargetOnly, DynamicTree(2, 2, 5)),
    "rejection, chain": (Rejection, Chain(2)),
    "rejection, static": (Rejection, TREE),
    "rejection, n-gram": (Rejection, None),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A target of 5 tokens, a prompt, and the probabilities of all 125 answers of 3, from transformers alone."""
    where = make_target(
        tmp_path_factory.mktemp("tiny"), num_layers=2, vocab_size=V, hidden_size=16, intermediate_size=16,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64, seed=5,
    )  # fmt: skip
    target, prompt = HFTarget(where, aux_layers=[0]), [2, 0, 3, 2, 0]
    sequences, exact = torch.tensor([prompt]), torch.ones(1)
    for _ in range(3):
        logits = target.model(input_ids=sequences, use_cache=False).logits[:, -1]
        exact = (exact[:, None] * (logits / TEMPERATURE).softmax(-1)).flatten()
        following = torch.arange(V).repeat(len(sequences))[:, None]
        sequences = torch.cat((sequences.repeat_interleave(V, dim=0), following), dim=1)
    return target, prompt, exact


def sample(target, prompt, drafter, verifier):
    """Counts of the answers, float32 [125], and the acceptance length."""
    counts, emitted = torch.zeros(V**3), []
    for _ in range(DRAWS // BATCH):
        for answer in generate(
            target, drafter, [prompt] * BATCH, max_new_tokens=3, stop_ids=NO_STOP, verifier=verifier
        ):
            first, second, third = answer.tokens
            counts[(first * V + second) * V + third] += 1
            emitted += answer.emitted
    return counts, sum(emitted) / len(emitted)


@pytest.mark.parametrize("way", WAYS)
def test_sampled_answers_have_the_targets_distribution(tiny, way):
    target, prompt, exact = tiny
    verifier_class, tree_builder = WAYS[way]
    draft = random_draft("eagle3", target, draft_vocab=4)
    drafter = EagleDrafter(draft, target, tree_builder) if tree_builder else NgramDrafter(3)
    verifier = verifier_class(Sampling(TEMPERATURE), torch.Generator().manual_seed(0))
    counts, tau = sample(target, prompt, drafter, verifier)
    assert chi_square_p(counts, exact) > LEVEL
    assert 1.05 < tau < 1.95, "nothing accepted, or nothing rejected, proves little"


def test_another_temperature_is_detected(tiny):
    target, prompt, exact = tiny
    verifier = TargetOnly(Sampling(1.4), torch.Generator().manual_seed(0))
    assert chi_square_p(sample(target, prompt, NoDrafter(), verifier)[0], exact) < 1e-9
