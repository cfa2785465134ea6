"""``draft.init_from``: shape, vocabulary and weights come from the named draft, in any known format."""

import pytest
import torch

from nemo_speculative.algorithms.eagle3.network import Eagle3Draft
from nemo_speculative.config.app import to_job
from nemo_speculative.config.schema import Eagle3DraftConfig, EagleDraftConfig
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.tokenized_dataset import TokenizedDataset, count_supervised
from nemo_speculative.data.vocab_mapping import vocab_mapping_from_d2t
from nemo_speculative.training import build
from nemo_speculative.training.checks import read_init_from, resolve_draft, use_init_shape
from nemo_speculative.utils.errors import UserError
from tests.checkpoint import layouts
from tests.config.test_groups import composed


@pytest.fixture
def published(tmp_path):
    """An EAGLE-3 draft in another project's format, for the target of the tests."""
    return layouts.specforge(tmp_path / "published")


def job_from(path, *overrides):
    return to_job(composed("train_eagle3", "data=tiny", f"draft.init_from={path}", "model=local", *overrides))


def test_shape_vocabulary_and_weights_are_adopted(published, target, capsys):
    job = job_from(published)
    resolve_draft(job, target.config)
    rows = TokenizedDataset(300)
    vocabulary = build.build_draft_vocabulary(job, target, rows)
    assert vocabulary.ids.tolist() == layouts.DRAFT_IDS
    draft, start = build.build_draft(job, target, vocabulary), read_init_from(job.draft, target.config)
    assert isinstance(draft, Eagle3Draft) and draft.shape == start.shape
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, start.tensors[name].to(tensor.dtype)), name
    assert draft.fc.weight.dtype == torch.float32 and draft.fc.weight.requires_grad


def test_a_contradicting_configuration_is_rejected(published, target):
    start = read_init_from(Eagle3DraftConfig(init_from=str(published)), target.config)
    with pytest.raises(UserError, match=r"draft.num_heads is 8, and draft.init_from \(.*\) says 4; leave out one"):
        use_init_shape(Eagle3DraftConfig(num_heads=8), start)
    with pytest.raises(UserError, match=r"draft.vocab_size is 50, and draft.init_from"):
        use_init_shape(Eagle3DraftConfig(vocab_size=50), start)
    assert use_init_shape(Eagle3DraftConfig(num_heads=4), start).num_layers == 1


def test_a_draft_of_another_algorithm_is_rejected(published, target):
    with pytest.raises(UserError, match=r"is a Eagle3Draft, and draft\._target_ a EagleDraft; choose the draft group"):
        read_init_from(EagleDraftConfig(init_from=str(published)), target.config)


def test_a_missing_directory_is_rejected(tmp_path, target):
    with pytest.raises(UserError, match="nowhere"):
        read_init_from(Eagle3DraftConfig(init_from=str(tmp_path / "nowhere")), target.config)


def test_the_coverage_of_an_adopted_vocabulary_is_counted(target):
    rows = [TokenRow("a", [2, 2, 7, 8], [False, True, True, True], "")]
    vocabulary = vocab_mapping_from_d2t(layouts.vocabulary_maps()["d2t"], count_supervised(rows, 300))
    assert vocabulary.coverage == pytest.approx(2 / 3) and vocabulary.ids.tolist() == layouts.DRAFT_IDS
