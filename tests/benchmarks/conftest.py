"""Cases small enough for tests."""

from dataclasses import replace

import pytest

from benchmarks.training_step.case import Case, Size
from benchmarks.training_step.setup import write_setup

TINY = Size(
    hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=48, vocab_size=96,
    draft_vocab_size=64, aux_layers=[0, 1, 2], rows=2, row_tokens=64,
)  # fmt: skip


@pytest.fixture
def make_case():
    """Makes a case of a tiny size, with some settings changed."""
    plain = Case(size=TINY, draft="eagle3", num_steps=4, dtype="float32", lengths="full", supervised=0.5, threads=1)
    return lambda **changes: replace(plain, **changes)


@pytest.fixture
def make_setup(tmp_path_factory, make_case):
    """Writes the input of such a case into its own directory."""
    return lambda **changes: write_setup(tmp_path_factory.mktemp("setup"), make_case(**changes))
