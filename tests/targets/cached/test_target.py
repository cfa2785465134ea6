"""Training from features: the losses of online training, in any packing, and every mismatch rejected by name."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_speculative.config.schema import MaskConvention
from nemo_speculative.data.batch import collate
from nemo_speculative.distributed.context_parallel import ContextGroup
from nemo_speculative.targets.cached.shards import stored_positions
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.utils.errors import UserError
from tests.conftest import PREFIX_TEMPLATE, make_target, make_tokenizer
from tests.targets.cached.cases import (
    assert_same,
    batches_of,
    capture_into,
    eagle1,
    eagle3,
    loss_of,
    make_documents,
    reading,
)

ROUNDING = 2e-5
"""Rounding of the target itself, when a document is at another place in a row."""


@pytest.mark.parametrize("packing", [{"seed": 5}, {"seed": 6, "rows": 1, "row_tokens": 50}, {"seed": 7, "rows": 5}])
def test_losses_and_gradients_equal_those_of_online_training(
    algorithm, online, captured, documents, target_dir, packing
):
    batches = batches_of(documents, **packing)
    features = reading(target_dir, captured, algorithm)
    features.expect(documents)
    assert_same(loss_of(algorithm, features, batches), loss_of(algorithm, online, batches), ROUNDING)


def test_losses_are_bit_identical_for_the_same_rows(algorithm, online, documents, target_dir, tmp_path):
    """With one document per row, at capture and in training, the target computes the same products."""
    alone = [d for d in documents if len(d.input_ids) == len(documents[0].input_ids)]
    batch = collate([alone], 96, pad_id=1)
    capture_into(tmp_path / "f", online, alone, algorithm)
    features = reading(target_dir, tmp_path / "f", algorithm)
    assert_same(loss_of(algorithm, features, [batch]), loss_of(algorithm, online, [batch]))


def test_stored_states_are_those_that_the_target_computed(algorithm, online, captured, documents, target_dir):
    features = reading(target_dir, captured, algorithm)
    for batch in batches_of(documents, seed=9):
        result, expected = features.compute_hidden_states(batch), online.compute_hidden_states(batch)
        for span in batch.spans:
            place = slice(span.start, span.end)
            num_aux, last_hidden = stored_positions(batch.loss_mask[span.row, place], features.store.manifest)
            front, labels = slice(span.start, span.start + num_aux), last_hidden + span.start
            torch.testing.assert_close(
                result.aux_hidden_states[span.row, front],
                expected.aux_hidden_states[span.row, front],
                rtol=1e-4,
                atol=1e-4,
            )
            torch.testing.assert_close(
                result.last_hidden_state[span.row, labels],
                expected.last_hidden_state[span.row, labels],
                rtol=1e-4,
                atol=1e-4,
            )
        assert (
            result.aux_hidden_states.shape == expected.aux_hidden_states.shape
            and result.aux_hidden_states.dtype == expected.aux_hidden_states.dtype
        )
        shard = ContextGroup.planned(2).shard(batch.num_tokens, halo=3)
        actual, reference = features.compute_hidden_states(replace(batch, shard=shard)), result.shard(shard)
        assert torch.equal(actual.aux_hidden_states, reference.aux_hidden_states) and torch.equal(
            actual.last_hidden_state, reference.last_hidden_state
        )
        assert actual.aux_hidden_states.shape[1] < batch.num_tokens


@pytest.mark.parametrize(("stored", "tolerance"), [("bfloat16", 0.05), ("fp8", 0.3)])
def test_smaller_encodings_only_lose_precision(algorithm, online, documents, target_dir, tmp_path, stored, tolerance):
    plain = capture_into(tmp_path / "plain", online, documents, algorithm)
    small = capture_into(tmp_path / "small", online, documents, algorithm, encoding=stored)
    assert bytes_of(small) < bytes_of(plain) * {"bfloat16": 0.55, "fp8": 0.4}[stored]
    batches = batches_of(documents, seed=2)
    features = reading(target_dir, small, algorithm)
    shard = ContextGroup.planned(2).shard(batches[0].num_tokens, halo=3)
    actual = features.compute_hidden_states(replace(batches[0], shard=shard))
    assert torch.equal(
        actual.aux_hidden_states, features.compute_hidden_states(batches[0]).shard(shard).aux_hidden_states
    )
    loss, _ = loss_of(algorithm, features, batches)
    assert abs(loss - loss_of(algorithm, online, batches)[0]) < tolerance * abs(loss)


def bytes_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def test_only_embedding_and_head_of_the_target_are_loaded(captured, algorithm, target_dir):
    features = reading(target_dir, captured, algorithm)
    assert not any("layers." in name for name, _ in features.model.named_parameters())
    assert features.requests_ahead > 0


def test_a_bfloat16_target_is_read_back_bit_for_bit(target_dir, documents, tmp_path):
    algorithm, target = eagle3(), HFTarget(target_dir, aux_layers=None, dtype=torch.bfloat16)
    capture_into(tmp_path / "f", target, documents[:1], algorithm)
    features = reading(target_dir, tmp_path / "f", algorithm, dtype=torch.bfloat16)
    batch = collate([documents[:1]], 96, pad_id=1)
    front, _ = stored_positions(batch.loss_mask[0, : len(documents[0].input_ids)], features.store.manifest)
    result, expected = (
        features.compute_hidden_states(batch).aux_hidden_states,
        target.compute_hidden_states(batch).aux_hidden_states,
    )
    assert result.dtype == torch.bfloat16 and torch.equal(result[0, :front], expected[0, :front])


def test_a_batch_without_documents_is_zeros(algorithm, captured, target_dir):
    result = reading(target_dir, captured, algorithm).compute_hidden_states(collate([[]], 96, pad_id=1))
    assert not result.aux_hidden_states.any() and not result.last_hidden_state.any()


def test_missing_documents_are_counted_and_the_first_is_named(algorithm, captured, documents, target_dir):
    features, others = reading(target_dir, captured, algorithm), make_documents(3, seed=8)
    with pytest.raises(UserError, match=r"3 of 17 documents are not in .*, the first is c0: .*capture_features.py"):
        features.expect([*documents, *others])
    with pytest.raises(UserError, match="document c0 is not in"):
        features.compute_hidden_states(batches_of(others)[0])


def test_documents_are_found_by_content_not_by_id(algorithm, captured, documents, target_dir):
    reading(target_dir, captured, algorithm).expect([dataclasses.replace(d, id="new", origin="") for d in documents])


@pytest.fixture(scope="module")
def base(tmp_path_factory, target, documents):
    return capture_into(tmp_path_factory.mktemp("base"), target, documents, eagle3())


def refusal(model, directory, algorithm, **settings):
    with pytest.raises(UserError) as refused:
        reading(model, directory, algorithm, **settings)
    line = str(refused.value)
    assert "\n" not in line
    return line


def test_other_aux_layers_are_rejected(base, target_dir):
    algorithm = dataclasses.replace(eagle3(), aux_layers=[0, 2, 4])
    assert f"aux_layers is [1, 3, 4] in {base} and [0, 2, 4] here" in refusal(target_dir, base, algorithm)
    assert f"aux_layers is [1, 3, 4] in {base} and [] here" in refusal(target_dir, base, eagle1())


def test_another_mask_convention_is_rejected(base, target_dir):
    message = refusal(target_dir, base, eagle3(MaskConvention.official))
    assert f"mask_convention is serving in {base} and official here" in message


def test_another_dtype_is_rejected(base, target_dir):
    message = refusal(target_dir, base, eagle3(), dtype=torch.bfloat16)
    assert f"dtype is float32 in {base} and bfloat16 here" in message


def test_other_weights_are_rejected(base, tmp_path):
    assert "target is " in refusal(make_target(tmp_path / "other", seed=1), base, eagle3())


def test_another_chat_template_is_rejected(base, target_dir, tmp_path):
    other = copy_of(target_dir, tmp_path / "other")
    make_tokenizer(PREFIX_TEMPLATE).save_pretrained(other)
    assert "chat_template is " in refusal(other, base, eagle3())


def test_another_tokenizer_is_rejected(base, target_dir, tmp_path):
    other = copy_of(target_dir, tmp_path / "other")
    rules = json.loads((other / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(rules))
    assert "tokenizer is " in refusal(other, base, eagle3())


def test_a_draft_that_reads_all_last_hidden_states_is_rejected(base, target_dir):
    class Both(eagle3().draft):
        READS_LAST_HIDDEN = True

    globals()["Both"] = Both
    algorithm = dataclasses.replace(eagle3(), draft=Both)
    algorithm.draft.__module__, algorithm.draft.__qualname__ = __name__, "Both"
    assert f"last_hidden is supervised in {base} and attended here" in refusal(target_dir, base, algorithm)


def test_a_directory_without_features_is_rejected(target_dir, tmp_path):
    assert "has no manifest.json" in refusal(target_dir, tmp_path, eagle3())


def copy_of(target_dir, directory):
    directory.mkdir()
    for file in target_dir.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory
