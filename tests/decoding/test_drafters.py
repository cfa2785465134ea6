import itertools

import pytest
import torch

from nemo_speculative.algorithms.common.schedule import Layout, Slots
from nemo_speculative.algorithms.common.ttt import compute_step0, unroll
from nemo_speculative.checkpoint.contract import contract_of
from nemo_speculative.decoding.cached_target import CachedTarget
from nemo_speculative.decoding.drafters import EagleDrafter, NgramDrafter, NoDrafter
from nemo_speculative.decoding.tree_builder import Chain, DynamicTree, StaticTree
from nemo_speculative.decoding.verify import Greedy, Rejection, Sampling, TargetOnly
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError
from tests.decoding.models import DRAFTS, TREE_BUILDERS, VOCAB_SIZE, prompts, random_draft, small_target

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return small_target(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("kind", DRAFTS)
def test_decoding_a_chain_equals_the_training_unroll(target, kind):
    """Train = serve: with a cache, the draft's outputs are those of the unroll on the same tokens."""
    draft, num_steps = random_draft(kind, target, seed=1), 4
    ids = torch.randint(0, VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(5))
    features, embeddings = draft.project_hidden_states(*target.forward(ids)), draft.embed_input_ids(ids)
    positions = torch.arange(20)[None]
    steps = torch.where(positions < 20 - num_steps - 1, num_steps, 0)
    layout, slots = Layout.of(positions, positions), Slots.of(positions, steps, CPU)
    state = compute_step0(draft, embeddings[0], features[0], layout)
    unrolled = unroll(draft, state.window(slots), slots)
    for t in range(20 - num_steps - 1):
        session = contract_of(type(draft)).session(draft)
        here = draft.rotary(positions[:, : t + 1], torch.float32)
        output = session.extend(embeddings[:, 1 : t + 2], features[:, : t + 1], here)[:, -1:]
        session.cache.advance(t + 1)
        for i in range(num_steps):
            torch.testing.assert_close(output[0, 0], unrolled[i][t], rtol=1e-4, atol=1e-4)
            token = embeddings[:, t + 2 + i : t + 3 + i]
            here = draft.rotary(positions[:, t + 1 + i : t + 2 + i], torch.float32)
            output = session.extend(token, draft.next_feature(output), here)
            session.cache.advance(1)


def states(target, sequences):
    """The target's states for ``sequences`` without their last tokens."""
    return CachedTarget(target, len(sequences)).prefill([tokens[:-1] for tokens in sequences])


BUSHY = {
    "chain": Chain(5),
    "static": StaticTree(tuple(path for n in range(1, 5) for path in itertools.product((0, 1), repeat=n))),
    "dynamic": DynamicTree(num_steps=4, topk=4, num_draft_tokens=50),
}


@pytest.mark.parametrize("tree", BUSHY)
@pytest.mark.parametrize("kind", ["eagle", "eagle3.1", "eagle3 of 2 layers"])
def test_a_tree_node_is_drafted_as_after_its_path_alone(target, kind, tree):
    """Each draft token has the logits of its own path, run as a chain through an empty cache."""
    draft = random_draft(kind, target)
    sequences = prompts(5, seed=8)
    drafter = EagleDrafter(draft, target, BUSHY[tree])
    grown = drafter.start(5, Greedy()).propose(sequences, states(target, sequences))
    parents = grown.parents.expand_as(grown.tokens).tolist()
    for row, tokens in enumerate(sequences):
        nodes, above = grown.tokens[row].tolist(), parents[row]
        children = {parent: [nodes[n] for n, p in enumerate(above) if p == parent] for parent in set(above) - {-1}}
        for parent, proposed in children.items():
            path = []
            while parent:
                path, parent = [nodes[parent], *path], above[parent]
            best = draft.draft_ids[_logits(draft, target, tokens, path).topk(len(proposed)).indices]
            assert sorted(proposed) == sorted(best.tolist())


def _logits(draft, target, tokens, path):
    """The draft's logits after a path: true features up to the last verified token, then its own outputs."""
    feature = draft.project_hidden_states(*target.forward(torch.tensor([tokens[:-1]])))
    session, length = contract_of(type(draft)).session(draft), len(tokens) - 1
    rotation = draft.rotary(torch.arange(length)[None], torch.float32)
    output = session.extend(draft.embed_input_ids(torch.tensor([tokens[1:]])), feature, rotation)[:, -1:]
    session.cache.advance(length)
    for i, token in enumerate(path):
        rotation = draft.rotary(torch.tensor([[length + i]]), torch.float32)
        embeddings = draft.embed_input_ids(torch.tensor([[token]]))
        output = session.extend(embeddings, draft.next_feature(output), rotation)
        session.cache.advance(1)
    return draft.compute_logits(output)[0, 0]


@pytest.mark.parametrize("tree", TREE_BUILDERS)
def test_drafting_continues_as_if_started_anew(target, tree):
    """Sequences verified in pieces of different lengths, one removed: the trees equal those of a fresh start."""
    drafter = EagleDrafter(random_draft("eagle3", target), target, TREE_BUILDERS[tree])
    whole = [(prompt * 9)[:30] for prompt in prompts(3, seed=9)]
    known = states(target, [[*tokens, 0] for tokens in whole])
    drafting, read, rows = drafter.start(3, Greedy()), [0, 0, 0], [0, 1, 2]
    for step, counts in enumerate([(5, 3, 9), (1, 4, 2), (3, 1, 1), (2, 6, 6)]):
        if step == 2:
            rows = [2, 0]
            drafting.select(rows)
        sequences = [whole[row][: read[row] + counts[row] + 1] for row in rows]
        piece = known.select(rows).at([range(read[row], read[row] + counts[row]) for row in rows])
        read = [done + n for done, n in zip(read, counts, strict=True)]
        result = drafting.propose(sequences, piece)
        fresh = drafter.start(len(rows), Greedy()).propose(sequences, states(target, sequences))
        assert torch.equal(result.tokens, fresh.tokens)
        assert torch.equal(result.parents, fresh.parents)


def test_ngram_proposes_the_continuation_of_the_latest_longest_match():
    drafter = NgramDrafter(num_steps=3, max_ngram=3)
    tokens = [1, 2, 3, 4, 9, 2, 3, 5, 6, 7, 1, 2, 3]
    assert drafter.lookup(tokens) == [4, 9, 2]  # "1 2 3" is longer than the later "2 3"
    assert drafter.lookup([8, 2, 3, 5, 6, 2, 3]) == [5, 6, 2]
    assert drafter.lookup([1, 2, 3]) == []


def test_ngram_proposals_of_a_batch_may_differ_in_length(target):
    sequences = [[8, 2, 3, 5, 6, 2, 3], [1, 2, 3], [4, 7, 4]]
    grown = NgramDrafter(3).propose(sequences, states(target, sequences))
    assert grown.tokens.tolist() == [[3, 5, 6, 2], [3, 0, 0, 0], [4, 7, 4, 0]]
    assert grown.parents.tolist() == [[-1, 0, 1, 2], [-1, -1, -1, -1], [-1, 0, 1, -1]]


def test_no_drafter_proposes_nothing(target):
    assert NoDrafter().propose([[1, 2]], states(target, [[1, 2]])).tokens.tolist() == [[2]]


@pytest.mark.parametrize("tree_builder", [DynamicTree(2, 10, 12), StaticTree(tuple((i,) for i in range(10)))])
def test_more_children_than_draft_tokens_are_refused(target, tree_builder):
    with pytest.raises(UserError, match="topk is 10: the draft vocabulary has 9 tokens") as error:
        EagleDrafter(random_draft("eagle3", target, draft_vocab=9), target, tree_builder)
    assert "\n" not in str(error.value)


def test_a_dynamic_tree_cannot_be_verified_by_rejection(target):
    """It drops draft tokens for their score, so the remaining ones are not drawn from q."""
    drafter = EagleDrafter(random_draft("eagle3", target), target, TREE_BUILDERS["dynamic"])
    assert drafter.start(1, TargetOnly(Sampling(1.0)))
    with pytest.raises(UserError, match="set topk=1") as error:
        drafter.start(1, Rejection(Sampling(1.0)))
    assert "\n" not in str(error.value)


def test_eagle_needs_no_aux_layers(target):
    """It reads the last hidden state; a target may then be loaded without any."""
    bare = HFTarget(target.path, aux_layers=[])
    assert states(bare, [[1, 2, 3]]).aux_hidden_states.shape == (1, 2, 0)
    proposed = [
        EagleDrafter(random_draft("eagle", any_target), any_target, Chain(4))
        .start(1, Greedy())
        .propose([[1, 2, 3]], states(any_target, [[1, 2, 3]]))
        .tokens
        for any_target in (bare, target)
    ]
    assert torch.equal(*proposed)


def test_a_draft_for_other_aux_layers_is_refused(target):
    draft = random_draft("eagle3", target)
    other = HFTarget(target.path, aux_layers=[0, 2])
    with pytest.raises(ValueError, match="layers"):
        EagleDrafter(draft, other, Chain(3))
