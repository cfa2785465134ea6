"""Numbers that the schema derives, and values that it refuses."""

import pytest

from nemo_speculative.config.schema import (
    DataConfig,
    Eagle3DraftConfig,
    EagleDraftConfig,
    EvaluationConfig,
    ExporterConfig,
    FeaturesBackendConfig,
    HFBackendConfig,
    ParallelismConfig,
    RemoteBackendConfig,
    TinyModelConfig,
    TrainerConfig,
    TrainJob,
    VocabularySize,
)
from nemo_speculative.utils.errors import UserError


def data(**values) -> DataConfig:
    return DataConfig(path="some.jsonl", **values)


@pytest.mark.parametrize(
    ("settings", "context", "expected"),
    [
        ({}, 131072, (2048, 2048)),
        ({}, 256, (256, 256)),
        ({"max_length": 256}, 256, (256, 256)),
        ({"max_length": 100}, 256, (100, 100)),
        ({"packed_length": 4096}, 131072, (2048, 4096)),
        ({"packed_length": 1000}, 256, (256, 1000)),
        ({"max_length": 512, "packed_length": 512}, 1024, (512, 512)),
    ],
)
def test_lengths(settings, context, expected):
    assert data(**settings).lengths(context) == expected


@pytest.mark.parametrize(
    ("settings", "context", "expected"),
    [
        ({"max_length": 257}, 256, "data.max_length is 257, longer than the target's context of 256: lower"),
        ({"max_length": 512, "packed_length": 511}, 1024, "data.max_length is 512, longer than data.packed_length=511"),
        ({"packed_length": 1024}, 131072, "data.max_length is 2048, longer than data.packed_length=1024"),
    ],
)
def test_lengths_that_contradict_each_other(settings, context, expected):
    with pytest.raises(UserError) as caught:
        data(**settings).lengths(context)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ("auto", 128256, VocabularySize(32000)),
        ("auto", 32000, VocabularySize(32000)),
        ("auto", 300, VocabularySize(300)),
        (100, 300, VocabularySize(100)),
        (300, 300, VocabularySize(300)),
        ("full", 300, VocabularySize(300)),
        ("target_head", 300, VocabularySize(300, own_head=False)),
        ("99.5%", 300, VocabularySize(None, 0.995)),
        ("100%", 300, VocabularySize(None, 1.0)),
    ],
)
def test_vocabulary_size(size, target, expected):
    assert Eagle3DraftConfig(vocab_size=size).vocabulary(target) == expected


def test_eagle1_drafts_any_id():
    assert EagleDraftConfig().vocabulary(300) == VocabularySize(300)


@pytest.mark.parametrize("size", [0, -1, True, 2.5, "all", "0%", "101%", "99.5", None, "%"])
def test_an_invalid_vocabulary_size(size):
    with pytest.raises(
        UserError, match=r"^draft\.vocab_size is .*: expected a number above 0, a coverage such as 99.5%"
    ):
        Eagle3DraftConfig(vocab_size=size)


def test_a_draft_vocabulary_larger_than_the_targets():
    with pytest.raises(UserError) as caught:
        Eagle3DraftConfig(vocab_size=301).vocabulary(300)
    assert str(caught.value) == (
        "draft.vocab_size is 301, larger than the target's vocabulary of 300: set draft.vocab_size=300 or less, or auto"
    )


@pytest.mark.parametrize("layers", [[1, 1], [1, 3, 4, 3], []])
def test_aux_layers_must_be_distinct(layers):
    with pytest.raises(UserError, match=r"draft\.aux_layers is .*: expected distinct layers"):
        Eagle3DraftConfig(aux_layers=layers)


@pytest.mark.parametrize("layers", [None, [5], [1, 3, 4]])
def test_aux_layers_that_are_distinct(layers):
    assert Eagle3DraftConfig(aux_layers=layers).aux_layers == layers


@pytest.mark.parametrize(
    ("settings", "rows", "expected"),
    [
        ({"max_steps": 400}, 10**6, 400),
        ({"max_steps": 400, "epochs": 3.0}, 10, 400),
        ({"epochs": 1.0, "global_batch_size": 8}, 80, 10),
        ({"epochs": 2.0, "global_batch_size": 8}, 80, 20),
        ({"epochs": 0.5, "global_batch_size": 8}, 80, 5),
        ({"epochs": 1.0, "global_batch_size": 8}, 83, 10),
        ({"epochs": 1.0, "global_batch_size": 8}, 85, 11),
        ({"epochs": 1.0, "global_batch_size": 8}, 1, 1),
    ],
)
def test_total_steps(settings, rows, expected):
    assert TrainerConfig(**settings).total_steps(rows) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (5, 1, 6)),
        ({"num_steps": 3}, (3, 1, 4)),
        ({"num_steps": 3, "num_draft_tokens": 4}, (3, 1, 4)),
        ({"num_steps": 5, "topk": 4, "num_draft_tokens": 16}, (5, 4, 16)),
    ],
)
def test_the_exporter_derives_the_draft_tokens_of_a_chain(settings, expected):
    exporter = ExporterConfig(**settings)
    assert (exporter.num_steps, exporter.topk, exporter.num_draft_tokens) == expected


@pytest.mark.parametrize("tokens", [1, 5, 7])
def test_a_chain_verifies_one_token_more_than_it_drafts(tokens):
    with pytest.raises(UserError, match=r"exporter.num_draft_tokens is \d: .*topk=1, expected num_steps \+ 1 = 6"):
        ExporterConfig(num_draft_tokens=tokens)


def test_a_path_for_the_embedded_target_suggests_model_local():
    with pytest.raises(
        UserError, match=r"model\.path is /my/llm, and model is tiny, the embedded target: add model=local"
    ):
        TinyModelConfig(path="/my/llm")


def test_an_evaluation_takes_null_values_from_the_run():
    run = {"max_new_tokens": 128, "num_threads": 1, "batch_size": 8}
    assert EvaluationConfig().like(run) == EvaluationConfig(max_new_tokens=128, num_threads=1)
    assert EvaluationConfig(max_new_tokens=64).like(run).answer_tokens == 64
    assert EvaluationConfig().like({}).answer_tokens == 256


@pytest.mark.parametrize(
    ("settings", "width", "device", "expected"),
    [
        ({}, 4096, "cuda", 8192),
        ({}, 256, "cpu", 512),
        ({}, 1 << 20, "cpu", 1),
        ({"ttt_chunk_slots": 100}, 256, "cpu", 100),
    ],
)
def test_slots_of_a_chunk(settings, width, device, expected):
    assert TrainerConfig(**settings).slots(width, device) == expected


def job(global_batch_size: int, **parallelism) -> TrainJob:
    return TrainJob(
        backend=HFBackendConfig(),
        data=data(),
        trainer=TrainerConfig(global_batch_size=global_batch_size),
        parallelism=ParallelismConfig(**parallelism),
    )


@pytest.mark.parametrize(
    ("parallelism", "ranks", "expected"), [({}, 1, 1), ({"shard": -1}, 8, 8), ({"shard": -1, "context": 4}, 32, 8)]
)
def test_the_number_of_data_parallel_ranks(parallelism, ranks, expected):
    assert job(8, **parallelism).data_ranks(ranks) == expected


@pytest.mark.parametrize(
    ("parallelism", "ranks", "expected"),
    [
        ({"shard": -1}, 16, "trainer.global_batch_size is 8: it cannot be split evenly over 16 ranks"),
        ({"shard": -1, "context": 2}, 6, "trainer.global_batch_size is 8: it cannot be split evenly over 3 ranks (2 "),
        ({"context": 2}, 1, "parallelism: replicate=1, shard=1 and context=2 do not multiply to the 1 process"),
    ],
)
def test_a_global_batch_that_cannot_be_split_over_the_ranks(parallelism, ranks, expected):
    with pytest.raises(UserError) as caught:
        job(8, **parallelism).data_ranks(ranks)
    assert str(caught.value).startswith(expected)


def test_ranks_wait_as_long_as_the_backend_may_take():
    servers = RemoteBackendConfig(urls=["http://a:1", "http://b:1"], timeout=300, attempts=4)
    assert servers.longest_wait == 2400
    features = {"directory": "somewhere", "draft": "some.Draft"}
    assert FeaturesBackendConfig(**features).longest_wait == HFBackendConfig().longest_wait == 0
    assert FeaturesBackendConfig(**features, fill=True).longest_wait > 600
