"""EAGLE's offline format: losses equal those of online training, and other files are rejected by name."""

import pickle
from pathlib import Path

import pytest
import torch

from nemo_speculative.targets.cached.eagle_files import EagleFiles
from nemo_speculative.utils.errors import UserError
from tests.targets.cached.cases import ROW, assert_same, batches_of, capture_into, eagle1, eagle3, loss_of, reading

ROUNDING = 2e-5


def write_files(directory, target, documents, *, batched=False):
    """Writes files like ge_data of the official code: one dictionary per sample, in numbered folders."""
    for n, row in enumerate(documents):
        ids = torch.tensor(row.input_ids)
        aux, hidden = target.forward(ids[None])
        sample = {"input_ids": ids, "hidden_state": hidden[0], "loss_mask": torch.tensor(row.loss_mask).long()}
        if aux.numel():
            sample["aux_hidden_state"] = aux[0]
        if batched:
            sample = {name: x[None] for name, x in sample.items()}
        file = directory / str(n % 2) / f"data_{n}.ckpt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(sample, file)
    return directory


def files_of(target_dir, directory, algorithm, **settings):
    settings = {"max_length": 64, "row_tokens": ROW} | settings
    return EagleFiles(target_dir, directory, aux_layers=algorithm.aux_layers, **settings)


@pytest.mark.parametrize("batched", [False, True])
def test_losses_equal_those_of_online_training(algorithm, online, documents, target_dir, tmp_path, batched):
    files = files_of(target_dir, write_files(tmp_path / "ckpt", online, documents, batched=batched), algorithm)
    assert sorted(d.input_ids for d in files.documents) == sorted(d.input_ids for d in documents)
    capture_into(tmp_path / "f", files, files.documents, algorithm)
    batches = batches_of(documents, seed=4)
    features = reading(target_dir, tmp_path / "f", algorithm)
    assert_same(loss_of(algorithm, features, batches), loss_of(algorithm, online, batches), ROUNDING)


def test_long_samples_are_truncated(target_dir, online_of, documents, tmp_path):
    algorithm = eagle1()
    files = files_of(target_dir, write_files(tmp_path, online_of(algorithm), documents), algorithm, max_length=20)
    assert max(len(d.input_ids) for d in files.documents) == 20
    files.compute_hidden_states(batches_of(files.documents)[0])


def test_the_heads_agreement_identifies_the_target(target_dir, online_of, documents, tmp_path):
    target, rows = online_of(eagle1()), []
    for row in documents:  # the target's own predictions
        hidden = target.forward(torch.tensor(row.input_ids)[None])[1]
        best = target.logits(hidden)[0].argmax(-1).tolist()
        rows.append((row, hidden[0], best))
    for n, (row, hidden, best) in enumerate(rows):
        ids = torch.tensor([row.input_ids[0], *best[:-1]])
        torch.save(
            {"input_ids": ids, "hidden_state": hidden, "loss_mask": torch.tensor(row.loss_mask)}, tmp_path / f"{n}.ckpt"
        )
    assert files_of(target_dir, tmp_path, eagle1()).agreement() == 1.0
    for file in tmp_path.glob("*.ckpt"):
        sample = torch.load(file, weights_only=True)
        torch.save(sample | {"hidden_state": torch.randn_like(sample["hidden_state"])}, file)
    other = files_of(target_dir, tmp_path, eagle1())
    assert other.agreement() < 0.2 and "of the supervised tokens first" in other.report()


class Code:
    def __reduce__(self):
        return (Path("/tmp/never-made-by-a-test").touch, ())


def test_code_in_a_pickle_is_not_run(target_dir, online_of, documents, tmp_path):
    write_files(tmp_path, online_of(eagle1()), documents[:2])
    torch.save({"input_ids": Code(), "hidden_state": 0, "loss_mask": 0}, tmp_path / "0" / "data_0.ckpt")
    refused(target_dir, tmp_path, eagle1(), r"data_0\.ckpt: cannot be read as tensors alone .*never loaded")
    assert not Path("/tmp/never-made-by-a-test").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"input_ids": torch.arange(4), "loss_mask": torch.ones(4)},
            r"found \['input_ids', 'loss_mask'\], expected the keys",
        ),
        ([1, 2], "found list, expected the keys"),
        ({"hidden_state": torch.zeros(4, 16)}, r"hidden_state has shape \[4, 16\], expected \[4, 32\]"),
        ({"hidden_state": torch.zeros(3, 32)}, r"hidden_state has shape \[3, 32\], expected \[4, 32\]"),
        ({"loss_mask": torch.ones(3)}, r"loss_mask has shape \[3\], expected \[4\]"),
        ({"loss_mask": [1, 1, 1, 1]}, "each a tensor: loss_mask is list"),
    ],
)
def test_other_contents_are_rejected_naming_the_file(target_dir, tmp_path, content, message):
    whole = {"input_ids": torch.arange(4), "loss_mask": torch.ones(4), "hidden_state": torch.zeros(4, 32)}
    partial = isinstance(content, list) or "input_ids" in content
    torch.save(content if partial else whole | content, tmp_path / "a.ckpt")
    refused(target_dir, tmp_path, eagle1(), message)


def test_eagle3_needs_the_aux_states(target_dir, online_of, documents, tmp_path):
    write_files(tmp_path, online_of(eagle1()), documents[:2])
    refused(target_dir, tmp_path, eagle3(), "expected the keys .*aux_hidden_state")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1])])
def test_other_files_are_rejected(target_dir, tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    refused(target_dir, tmp_path, eagle1(), r"a\.ckpt: cannot be read as tensors alone")


def test_a_directory_without_samples_is_rejected(target_dir, tmp_path):
    refused(target_dir, tmp_path, eagle1(), "holds no .ckpt file")


def refused(target_dir, directory, algorithm, message):
    with pytest.raises(UserError, match=message) as error:
        files_of(target_dir, directory, algorithm)
    assert "\n" not in str(error.value)
