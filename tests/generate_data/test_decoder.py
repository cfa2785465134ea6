import asyncio

import torch

from nemo_speculative.algorithms.common.drafting import KVCache
from nemo_speculative.decoding.verify import Sampling
from nemo_speculative.generate_data.engines import Decoder
from nemo_speculative.generate_data.rollout import Request
from nemo_speculative.utils.errors import UserError


def test_sampled_tokens_have_the_distribution_of_the_target(target):
    """The first token of many seeds against the model's own probabilities (chi-square, 99.9 %)."""
    prompt, count = [0, 3, 40, 41, 4], 2000
    sampling = Sampling(temperature=1.0, top_k=5)

    async def first_tokens():
        decoder = Decoder(target, 500, sampling)
        requests = [decoder.complete(Request(prompt, 1, seed, [])) for seed in range(count)]
        return [c.ids[0] for c in await asyncio.gather(*requests)]

    p = target.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    likeliest = p.topk(5)
    expected = likeliest.values / likeliest.values.sum() * count
    counts = torch.bincount(torch.tensor(asyncio.run(first_tokens())), minlength=300)
    assert int(counts.sum()) == int(counts[likeliest.indices].sum()) == count
    assert float(((counts[likeliest.indices] - expected) ** 2 / expected).sum()) < 18.5


def test_rows_join_and_leave_the_batch_at_any_step(target):
    """Answers of many lengths in few slots equal those generated alone."""

    async def answered(size, requests):
        decoder = Decoder(target, size, Sampling())
        return [c.ids for c in await asyncio.gather(*map(decoder.complete, requests))]

    requests = [Request([0, 3, *range(30 + i, 36 + 3 * i), 4], 1 + 5 * i % 17, 0, []) for i in range(20)]
    together = asyncio.run(answered(3, requests))
    assert together == [asyncio.run(answered(1, [request]))[0] for request in requests]
    assert all(len(ids) <= request.limit for ids, request in zip(together, requests, strict=True))


def test_an_error_of_the_model_reaches_all_callers(target, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    async def ask():
        decoder = Decoder(target, 2, Sampling())
        monkeypatch.setattr(type(target), "forward", full)
        requests = [decoder.complete(Request([0, 5], 4, 0, [])) for _ in range(3)]
        return await asyncio.gather(*requests, return_exceptions=True)

    counts = asyncio.run(ask())
    assert len(counts) == 3 and all(isinstance(error, UserError) for error in counts)
    assert "engine.batch_size is 2" in str(counts[0])


def test_a_joined_cache_holds_both_contents():
    one, two = KVCache(2), KVCache(1)
    for cache, tokens in ((one, 3), (two, 90)):
        for layer in range(2):
            rows = len(cache.lengths)
            cache.append(layer, torch.full((rows, 1, tokens, 2), tokens + layer), torch.zeros(rows, 1, tokens, 2))
        cache.advance(tokens)
    one.join(two)
    assert one.lengths == [3, 3, 90]
    keys, _ = one.append(1, torch.full((3, 1, 1, 2), 7), torch.zeros(3, 1, 1, 2))
    assert keys[0, 0, :4, 0].tolist() == [4, 4, 4, 7] and keys[2, 0, :91, 0].tolist() == [91] * 90 + [7]
