import random

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nemo_speculative.decoding.cached_target import CachedTarget
from nemo_speculative.decoding.drafters import Drafter, Drafting, EagleDrafter, NgramDrafter, NoDrafter
from nemo_speculative.decoding.engine import Batch, Row, generate
from nemo_speculative.decoding.tree_builder import Chain, DynamicTree
from nemo_speculative.decoding.verify import Greedy, Sampling, SeededSampling, chains, trees
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError
from tests.conftest import make_tokenizer
from tests.decoding.models import (
    AUX_LAYERS,
    NO_STOP,
    TREE_BUILDERS,
    VOCAB_SIZE,
    plain,
    prompts,
    random_draft,
    small_target,
    tree_of,
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return small_target(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module", params=TREE_BUILDERS)
def drafter(request, target):
    return EagleDrafter(random_draft("eagle3", target), target, TREE_BUILDERS[request.param])


class Oracle(Drafter, Drafting):
    """Proposes the right continuation of one prompt up to a given number of tokens, then wrong ones, in a tree.

    In the static tree the right path is the one of the second children where there are some, and the other nodes are
    wrong.
    """

    PATH = (0, 2, 8, 20)

    def __init__(self, answer, prompt, right, as_tree=False):
        self.answer, self.prompt, self.right, self.as_tree = answer, len(prompt), right, as_tree

    def start(self, batch_size, verifier):
        self.calls = 0
        return self

    def select(self, rows):
        raise AssertionError("there is one sequence only")

    def propose(self, sequences, verified):
        done = len(sequences[0]) - self.prompt
        truth = self.answer[done : done + (3 if self.as_tree else 5)]
        right = self.right[self.calls % len(self.right)]
        self.calls += 1
        tokens = [t if i < right else (t + 1) % VOCAB_SIZE for i, t in enumerate(truth)]
        if not self.as_tree:
            return chains(torch.tensor([[sequences[0][-1], *tokens]]))
        nodes = [sequences[0][-1], *[VOCAB_SIZE] * 25]
        for node, token in zip(self.PATH[1:], tokens, strict=False):
            nodes[node] = token
        grown = trees(torch.tensor([nodes]) % VOCAB_SIZE, torch.tensor([tree_of()]), 5)
        wrong = torch.tensor([[node not in self.PATH[: len(tokens) + 1] for node in range(26)]])
        parents = grown.parents.masked_fill(wrong, -1)
        return type(grown)(grown.tokens, parents, grown.depths, grown.ancestors, grown.levels)


def answered(target, prompt, limit, **oracle):
    """The target's own answer, and an oracle that drafts from it."""
    answer = plain(target, [prompt], limit + 6)[0]
    return answer, Oracle(answer, prompt, **oracle)


@pytest.mark.parametrize("as_tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("right", [[0], [3], [2], [3, 0, 1]])
def test_emitted_counts_accepted_tokens_and_the_bonus(target, right, as_tree):
    prompt = prompts(1)[0]
    answer, oracle = answered(target, prompt, 31, right=right, as_tree=as_tree)
    generation = generate(target, oracle, [prompt], max_new_tokens=31, stop_ids=NO_STOP)[0]
    assert generation.tokens == answer[:31] and not generation.finished
    expected, left = [], 30
    while left:
        expected.append(min(right[len(expected) % len(right)] + 1, left))
        left -= expected[-1]
    assert generation.emitted == expected


@pytest.mark.parametrize("as_tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("at", range(8))
def test_a_stop_token_inside_an_accepted_path_ends_the_answer_there(target, at, as_tree):
    prompt = prompts(1, seed=3)[0]
    answer, oracle = answered(target, prompt, 30, right=[3], as_tree=as_tree)
    stop_ids = frozenset({answer[at]})
    expected = plain(target, [prompt], 30, stop_ids)[0]
    assert len(expected) == answer.index(answer[at]) + 1
    generation = generate(target, oracle, [prompt], max_new_tokens=30, stop_ids=stop_ids)[0]
    assert generation.tokens == expected and generation.finished
    assert sum(generation.emitted) == len(expected) - 1


@pytest.mark.parametrize("limit", range(1, 8))
def test_never_more_than_max_new_tokens(target, limit):
    prompt = prompts(1)[0]
    answer, oracle = answered(target, prompt, limit, right=[5])
    assert generate(target, oracle, [prompt], max_new_tokens=limit, stop_ids=NO_STOP)[0].tokens == answer[:limit]


def test_a_stop_token_at_the_limit_still_finishes(target):
    prompt = prompts(1)[0]
    answer, oracle = answered(target, prompt, 10, right=[5])
    first = answer.index(answer[4])
    result = generate(target, oracle, [prompt], max_new_tokens=first + 1, stop_ids={answer[4]})[0]
    assert result.finished and result.tokens == answer[: first + 1]
    result = generate(target, oracle, [prompt], max_new_tokens=first, stop_ids={answer[4]})[0]
    assert not result.finished and result.tokens == answer[:first], "accepted, but past the limit"


def test_a_batch_gives_what_each_sequence_gives_alone(target, drafter):
    """Ragged prompts, answers that stop at different times: tokens and every verification."""
    questions, stop_ids = prompts(12, seed=2), frozenset({4})
    together = generate(target, drafter, questions, max_new_tokens=20, stop_ids=stop_ids)
    alone = [generate(target, drafter, [prompt], max_new_tokens=20, stop_ids=stop_ids)[0] for prompt in questions]
    assert together == alone
    lengths = {len(g.tokens) for g in together}
    assert len(lengths) > 4 and any(g.finished for g in together) and not all(g.finished for g in together)


def test_two_batches_of_one_drafter_are_independent(target, drafter):
    questions = prompts(2, seed=6)
    rows = [Row(prompt, 12) for prompt in questions]
    batches = [Batch(target, drafter, lambda _: Greedy(), NO_STOP) for _ in rows]
    for batch, row in zip(batches, rows, strict=True):
        batch.admit([row])
    while not all(row.done for row in rows):
        for batch, row in zip(batches, rows, strict=True):
            if not row.done:
                batch.step()
    assert [row.answer for row in rows] == plain(target, questions, 12)


class RecordingVerifier(Greedy):
    """Greedy verification that records the depth of its trees."""

    def __init__(self):
        self.deepest = []

    def verify(self, trees, logits):
        depths = trees.depths.expand_as(trees.tokens)
        self.deepest.append(depths.masked_fill(trees.parents < 0, 0).amax(1).tolist())
        return super().verify(trees, logits)


@pytest.mark.parametrize("left", [1, 2, 4])
def test_an_answer_fills_the_context_and_no_more(target, drafter, left):
    """The tree is cut where the context ends; positions beyond it are never used, alone or next to a short prompt."""
    context = target.config.max_position_embeddings
    long, short = (prompts(1)[0] * 40)[: context - left], prompts(2)[1]
    positions = []
    forward = target._decoder.forward

    def watched(*args, position_ids=None, **kwargs):
        positions.append(int(position_ids.max()) if position_ids is not None else 0)
        return forward(*args, position_ids=position_ids, **kwargs)

    target._decoder.forward = watched
    try:
        verifier = RecordingVerifier()
        result = generate(target, drafter, [long], max_new_tokens=50, stop_ids=NO_STOP, verifier=verifier)
        both = generate(target, drafter, [short, long], max_new_tokens=10, stop_ids=NO_STOP)
    finally:
        del target._decoder.forward
    assert result[0].tokens == plain(target, [long], left)[0] == both[1].tokens
    assert both[0].tokens == plain(target, [short], 10)[0]
    assert max(positions) < context and not result[0].finished
    for verification, (deepest,) in enumerate(verifier.deepest):
        assert deepest <= left - 1 - sum(result[0].emitted[:verification])


def test_the_draft_changes_only_the_speed(target):
    """Two random drafts: equal answers, other verifications."""
    drafters = [EagleDrafter(random_draft("eagle3", target, seed), target, Chain(4)) for seed in (0, 1)]
    one, two = (generate(target, d, prompts(20), max_new_tokens=12, stop_ids=NO_STOP) for d in drafters)
    assert [g.tokens for g in one] == [g.tokens for g in two]
    assert [g.emitted for g in one] != [g.emitted for g in two]


COMMON = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LLAMA_LIKE = COMMON | {"intermediate_size": 64, "num_key_value_heads": 2}
FAMILIES = {
    "sliding windows everywhere": (MistralForCausalLM, MistralConfig(**LLAMA_LIKE, sliding_window=6)),
    "some sliding windows": (
        Qwen2ForCausalLM,
        Qwen2Config(**LLAMA_LIKE, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    ),
    "learned positions": (GPT2LMHeadModel, GPT2Config(**COMMON, intermediate_size=64)),
}


def family(where, name, attention="sdpa"):
    model_type, config = FAMILIES[name]
    torch.manual_seed(0)
    model_type(config).save_pretrained(where)
    make_tokenizer().save_pretrained(where)
    return HFTarget(where, aux_layers=AUX_LAYERS, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_give_their_own_answers(tmp_path, name, attention):
    """Batches and single sequences, chains and trees, up to the end of the context."""
    target = family(tmp_path, name, attention)
    if "some" in name:
        assert set(target.config.layer_types) == {"full_attention", "sliding_attention"}
    questions = prompts(10)
    expected = plain(target, questions, 20)
    assert len({tuple(answer) for answer in expected}) > 4
    for tree_builder in (Chain(4), DynamicTree(4, 3, 12)):
        drafter = EagleDrafter(random_draft("eagle", target), target, tree_builder)
        result = generate(target, drafter, questions, max_new_tokens=20, stop_ids=NO_STOP)
        assert [g.tokens for g in result] == expected
        end = (questions[4] * 9)[:60]
        result = generate(target, drafter, [end], max_new_tokens=20, stop_ids=NO_STOP)
        assert [g.tokens for g in result] == plain(target, [end], 4)


def test_an_attention_without_masks_is_replaced_by_one_with_masks(target, drafter, monkeypatch):
    """A stand-in for flash attention, which supports only causal masks."""
    calls = []

    def causal_only(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        calls.append(1)
        new, cached = query.shape[2], key.shape[2]
        mask = torch.ones(new, cached, dtype=torch.bool).tril(cached - new)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("causal_only", causal_only)
    AttentionMaskInterface.register("causal_only", lambda *args, **kwargs: None)
    config = target._decoder.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "causal_only")
    questions = prompts(6)
    result = generate(target, drafter, questions, max_new_tokens=10, stop_ids=NO_STOP)
    assert config._attn_implementation == "causal_only" and calls
    monkeypatch.undo()
    assert [g.tokens for g in result] == plain(target, questions, 10)


def test_a_target_that_ignores_the_tree_is_refused(tmp_path, monkeypatch):
    target = small_target(tmp_path)
    monkeypatch.setattr(HFTarget, "_attention_masks", lambda self, visible: None)
    with pytest.raises(UserError, match="cannot be decoded speculatively") as error:
        CachedTarget(target, 1)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_layers_of_an_unknown_kind_are_refused(tmp_path, monkeypatch):
    target = small_target(tmp_path)
    monkeypatch.setattr(target.config, "layer_types", ["chunked_attention"] * 4, raising=False)
    with pytest.raises(UserError, match="layers of the kind chunked_attention"):
        generate(target, NoDrafter(), prompts(1), max_new_tokens=2)


@pytest.mark.parametrize(
    "questions, limit, message",
    [
        ([[1], []], 5, "prompt 1 has 0 tokens: expected 1 to 63"),
        ([[1] * 64], 5, "prompt 0 has 64 tokens: expected 1 to 63, so that the target's context of 64"),
        ([[1]], 0, "max_new_tokens is 0"),
    ],
)
def test_prompts_without_room_for_an_answer_are_refused(target, questions, limit, message):
    with pytest.raises(UserError, match=message) as error:
        generate(target, NoDrafter(), questions, max_new_tokens=limit)
    assert "\n" not in str(error.value)


def test_no_prompts_give_no_answers(target):
    assert generate(target, NoDrafter(), [], max_new_tokens=5) == []


class SeededRow(Row):
    """A row with a random number generator of its own."""

    def __init__(self, prompt, limit, seed):
        super().__init__(prompt, limit)
        self.generator = random.Random(seed)


@pytest.mark.parametrize(
    ("drafter", "sampled"),
    [(NoDrafter(), False), (NoDrafter(), True), (NgramDrafter(3), False)],
    ids=["plain greedy", "plain sampled", "n-gram greedy"],
)
def test_rows_that_join_a_running_batch_get_their_own_answers(target, drafter, sampled):
    """Waiting prompts replace finished rows; answers sampled without a draft depend on the row's seed alone."""

    def verifier(rows):
        return SeededSampling(Sampling(1.5), [row.generator for row in rows]) if sampled else Greedy()

    def answers(size):
        rows = [SeededRow(prompt, 4 + 5 * i % 11, seed=i) for i, prompt in enumerate(prompts(9, seed=7))]
        waiting, batch = rows, Batch(target, drafter, verifier, NO_STOP)
        while waiting or batch.rows:
            joining = waiting[: size - sum(not row.done for row in batch.rows)]
            waiting = waiting[len(joining) :]
            if joining:
                batch.admit(joining)
            batch.release()
            if batch.rows:
                batch.step()
        return [row.answer for row in rows]

    together = answers(3)
    assert together == answers(1)
    assert [len(answer) for answer in together] == [4 + 5 * i % 11 for i in range(9)]


def test_rows_cannot_join_a_running_batch_with_a_stateful_drafter(target, drafter):
    batch = Batch(target, drafter, lambda rows: Greedy(), NO_STOP)
    batch.admit([Row([1, 2], 5)])
    with pytest.raises(AssertionError, match="stateless"):
        batch.admit([Row([1, 2], 5)])
