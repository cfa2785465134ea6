"""``plan=true``: how the work is shared, and what it refuses as the run would."""

import pytest
from transformers import LlamaConfig

from nemo_speculative.config.app import to_job
from nemo_speculative.training.plan import describe
from nemo_speculative.utils.errors import UserError
from tests.config.test_groups import composed
from tests.conftest import make_tokenizer
from tests.integration.conftest import data_file, settings  # noqa: F401


def planned(settings, *overrides):  # noqa: F811
    return describe(to_job(composed("train_eagle3", *settings, *overrides)))


LAYOUTS = {
    "1": (["parallelism=single"], "1 process(es): the draft whole; each holds the whole target, 98 MB"),
    "4": (
        ["parallelism=hsdp", "parallelism.shard=2", "backend=hf_tp", "backend.tp_size=2"],
        "4 process(es): the draft in 2 shards, 2 times; each holds 1/2 of the target, 49 MB",
    ),
    "2": (["backend=hf_fsdp2"], "2 process(es): the draft in 2 shards; each holds 1/2 of the target, 49 MB"),
    "8": (
        ["parallelism=cp", "parallelism.context=2", "trainer.global_batch_size=4", "backend=remote"],
        "8 process(es): the draft in 8 shards; 2 share each row; each holds the target's embedding and head, 41 MB",
    ),
}


@pytest.fixture(scope="module")
def large_target(tmp_path_factory):
    """Only described: of 24 M parameters, 10 M of them in embedding and head."""
    path = tmp_path_factory.mktemp("large")
    make_tokenizer().save_pretrained(path)
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=20000, hidden_size=256, intermediate_size=2048,
        num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=False,
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_it_says_how_processes_share_the_work(settings, large_target, monkeypatch, ranks):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", ranks)
    overrides, expected = LAYOUTS[ranks]
    assert f"layout    {expected}\n" in planned(settings, f"model.path={large_target}", *overrides)


def test_it_refuses_heads_that_cannot_be_divided_as_the_run_does(settings, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"backend\.tp_size is -1: the 2 key-value heads .* by 4; take a divisor"):
        planned(settings, "parallelism=fsdp2", "backend=hf_tp")


@pytest.mark.parametrize("said", ["abc", "0", "-1", ""])
def test_a_number_of_processes_that_is_none_is_refused(settings, monkeypatch, said):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(UserError, match=f"WORLD_SIZE={said}: expected the number of processes"):
        planned(settings)
