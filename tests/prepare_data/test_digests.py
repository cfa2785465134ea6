"""The set of digests equals Python's set, in less memory."""

import random

from nemo_speculative.prepare_data.run import DigestSet, _hash


def test_it_is_a_set():
    rng = random.Random(0)
    # Many with the same low bits, which collide in their slot.
    values = [rng.choice([rng.randrange(1, 50), rng.getrandbits(64) or 1, rng.getrandbits(20) << 44 | 1])
              for _ in range(5000)]  # fmt: skip
    mine, own = DigestSet(), set()
    for value in values:
        assert (value in mine) == (value in own)
        mine.add(value)
        own.add(value)
    assert len(mine) == len(own) > 2000
    assert all(value in mine for value in own)


def test_it_is_small():
    values = DigestSet()
    for n in range(100_000):
        values.add(_hash(str(n)))
    assert len(values) == 100_000
    assert 8 * len(values._slots) <= 32 * 100_000


def test_digests_of_different_kinds_differ():
    assert _hash("a") != _hash("a", b"name") and _hash("a") == _hash("a") != _hash("b")
    assert _hash("half a character \ud800")
