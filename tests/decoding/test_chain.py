import pytest
import torch

from nemo_speculative.decoding.drafters import Eagle3Drafter, NgramDrafter, NoDrafter
from nemo_speculative.decoding.generate import generate_greedy
from nemo_speculative.decoding.verification import verify_greedy
from nemo_speculative.drafts.eagle3 import DraftCache, Eagle3Draft, Eagle3Shape
from nemo_speculative.evaluation.acceptance import Measured

NO_STOP: frozenset[int] = frozenset()


class Oracle:
    """Proposes the right continuation up to a given number of tokens, then wrong ones."""

    def __init__(self, answer, prompt, right, width=5):
        self.answer, self.prompt, self.right, self.width = answer, len(prompt), right, width

    def start(self):
        self.calls = 0

    def propose(self, tokens, aux):
        done = len(tokens) - self.prompt
        right = self.right[self.calls % len(self.right)]
        self.calls += 1
        truth = self.answer[done : done + self.width]
        return [t if i < right else (t + 1) % 300 for i, t in enumerate(truth)]


def plain(target, prompt, limit, stop=NO_STOP):
    """One token at a time, the whole sequence anew: no cache, no drafter."""
    tokens = list(prompt)
    for _ in range(limit):
        tokens.append(int(target.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def prompts(number, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 300, (4 + n % 9,), generator=random).tolist() for n in range(number)]


def random_draft(target, seed, draft_vocab=120):
    torch.manual_seed(seed)
    draft = Eagle3Draft(Eagle3Shape.like_target(target.config, target.aux_layers, draft_vocab))
    ids = torch.randperm(target.config.vocab_size)[:draft_vocab].sort().values
    draft.d2t.copy_(ids - torch.arange(draft_vocab))
    return draft.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "draft, best, emitted",
    [([], [7], [7]), ([1, 2], [1, 2, 3], [1, 2, 3]), ([1, 9], [1, 2, 3], [1, 2]), ([9, 2], [1, 2, 3], [1])],
)
def test_verification_emits_the_matching_tokens_and_one_more(draft, best, emitted):
    assert verify_greedy(draft, best) == emitted


@pytest.mark.parametrize("seed", range(3))
def test_any_draft_gives_the_targets_own_answer(target, seed):
    drafter = Eagle3Drafter(random_draft(target, seed), target, num_steps=4)
    for prompt in prompts(6, seed):
        assert generate_greedy(target, drafter, prompt, 24, NO_STOP).tokens == plain(target, prompt, 24)


def test_plain_and_ngram_decoding_give_it_too(target):
    for drafter in (NoDrafter(), NgramDrafter(5)):
        for prompt in prompts(4):
            generation = generate_greedy(target, drafter, prompt, 30, NO_STOP)
            assert generation.tokens == plain(target, prompt, 30)
            assert sum(generation.emitted) + 1 == len(generation.tokens)


@pytest.mark.parametrize("right", [[0], [5], [2], [5, 0, 3, 1]])
def test_emitted_counts_what_was_right_and_the_bonus(target, right):
    prompt = prompts(1)[0]
    answer = plain(target, prompt, 40)
    generation = generate_greedy(target, Oracle(answer, prompt, right), prompt, 31, NO_STOP)
    assert generation.tokens == answer[:31]
    expected, left = [], 30
    while left:
        expected.append(min(right[len(expected) % len(right)] + 1, left))
        left -= expected[-1]
    assert generation.emitted == expected


@pytest.mark.parametrize("at", range(1, 8))
def test_a_stop_token_inside_an_accepted_path_ends_the_answer_there(target, at):
    prompt = prompts(1, seed=3)[0]
    answer = plain(target, prompt, 30)
    stop = frozenset({answer[at]})
    expected = plain(target, prompt, 30, stop)
    generation = generate_greedy(target, Oracle(answer, prompt, [5]), prompt, 30, stop)
    assert generation.tokens == expected and generation.finished
    assert sum(generation.emitted) == len(expected) - 1


def test_an_answer_fills_the_context_and_no_more(target):
    """The chain is shortened where the context ends; positions past it are never asked for."""
    context = target.config.max_position_embeddings
    prompt = (prompts(1)[0] * 80)[: context - 9]
    drafter = Eagle3Drafter(random_draft(target, 0), target, num_steps=5)
    generation = generate_greedy(target, drafter, prompt, 50, NO_STOP)
    assert len(prompt) + len(generation.tokens) == context
    assert generation.tokens == plain(target, prompt, 9)


def test_ngram_proposes_what_followed_the_latest_longest_match():
    drafter = NgramDrafter(num_steps=3, max_ngram=3)
    tokens = [1, 2, 3, 4, 9, 2, 3, 5, 6, 7, 1, 2, 3]
    assert drafter.propose(tokens, torch.empty(0)) == [4, 9, 2]  # "1 2 3" is longer than the later "2 3"
    assert drafter.propose([8, 2, 3, 5, 6, 2, 3], torch.empty(0)) == [5, 6, 2]
    assert drafter.propose([1, 2, 3], torch.empty(0)) == []


def test_decoding_a_chain_equals_the_training_unroll(target):
    """Train = serve: the draft's outputs behind a cache are those of the unroll on the same tokens."""
    draft, num_steps = random_draft(target, 1), 4
    ids = torch.tensor([prompts(1, seed=5)[0] * 3])
    length = ids.shape[1]
    aux, _ = target.forward(ids)
    embeddings, positions = target.embed(ids), torch.arange(length)[None]
    slots = torch.arange(length - num_steps - 1)[None]
    unrolled = draft.unroll(embeddings, aux, positions, torch.zeros_like(ids), slots, num_steps)
    cache = DraftCache()
    for t in slots[0].tolist():
        cache.crop(0)
        here = draft.rotary(positions[:, : t + 1], torch.float32)
        output = draft.extend(embeddings[:, 1 : t + 2], draft.fc(aux[:, : t + 1]), here, cache)[:, -1:]
        for i in range(num_steps):
            torch.testing.assert_close(output[0, 0], unrolled[i][0, t], rtol=1e-3, atol=1e-3)
            token = embeddings[:, t + 2 + i : t + 3 + i]
            here = draft.rotary(positions[:, t + 1 + i : t + 2 + i], torch.float32)
            output = draft.extend(token, output, here, cache)


def test_a_draft_for_other_aux_layers_is_refused(target):
    shape = Eagle3Shape.like_target(target.config, [0, 2, 4], 50)
    with pytest.raises(ValueError, match="layers"):
        Eagle3Drafter(Eagle3Draft(shape), target, 3)


def test_acceptance_figures_by_hand():
    """Verifications emitting 3, 1 and 2 tokens: τ = 2, and 1 + the acceptances is τ."""
    from nemo_speculative.decoding.generate import Generation

    measured = Measured([Generation([0] * 5, [3, 1], True), Generation([0] * 3, [2], False)])
    assert measured.tau == 2.0 and measured.tau_finished == 2.0
    assert measured.acceptance_per_position(3) == pytest.approx([2 / 3, 1 / 3, 0])
    assert 1 + sum(measured.acceptance_per_position(5)) == pytest.approx(measured.tau)
