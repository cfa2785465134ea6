"""Frames arrive as they were sent, and invalid ones are rejected."""

import contextlib
import json
import random

import pytest
import torch
from safetensors.torch import load, save

from nemo_speculative.data.batch import collate
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.remote.protocol import (
    MAX_HEADER_BYTES,
    MAX_TOKEN_BYTES,
    FrameError,
    OutputLayout,
    TargetIdentity,
    pack_batch,
    pack_output,
    unpack_batch,
)
from tests.target_servers import VOCAB, StandIn, batch_of

TENSORS = ("input_ids", "loss_mask", "positions", "documents")


def packed_batch():
    """Two rows: one of three documents and padding, one full."""
    rows = [
        [TokenRow(f"c{n}", list(range(n, n + n)), [True] * n, "") for n in lengths] for lengths in ([5, 3, 6], [16])
    ]
    return collate(rows, 16, pad_id=1)


def frame_of(**changes):
    """A valid request with some of its tensors replaced."""
    tensors = load(pack_batch(packed_batch())) | changes
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_a_batch_arrives_as_it_was_sent_without_conversation_ids():
    sent = packed_batch()
    result = unpack_batch(pack_batch(sent), VOCAB)
    assert all(torch.equal(getattr(result, n), getattr(sent, n)) for n in TENSORS)
    assert [(s.row, s.start, s.end) for s in result.spans] == [(s.row, s.start, s.end) for s in sent.spans]
    assert result.document_lengths() == sent.document_lengths() == [5, 3, 6, 2, 16]
    assert result.ids == ("",) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layers", [3, 0])
def test_an_output_is_a_safetensors_file_bit_for_bit(dtype, layers):
    """Read by safetensors itself; arbitrary bits, including NaN and infinity."""
    width = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = torch.randint(torch.iinfo(width).min, torch.iinfo(width).max, (2, 16, 4 * 8), dtype=width)
    sent = TargetOutput(bits.view(dtype)[..., : layers * 8], bits.view(dtype)[..., -8:])
    frame = b"".join(pack_output(sent))
    layout = OutputLayout.of(packed_batch(), 8, TargetIdentity("", str(dtype)[6:], [0] * layers))
    result, ours = load(frame), layout.read(filled(layout, frame))
    for name, field in (("aux", "aux_hidden_states"), ("last_hidden", "last_hidden_state")):
        assert result[name].dtype == dtype
        for read in (result[name], getattr(ours, field)):
            assert torch.equal(read.view(width), getattr(sent, field).contiguous().view(width))


def filled(layout, frame):
    buffer = layout.allocate(pinned=False)
    buffer.numpy()[:] = list(frame)
    return buffer


def test_the_bytes_per_token_are_as_documented():
    """(A + 1) * h numbers per token, and a small header."""
    batch = packed_batch()
    made = TargetOutput(torch.zeros(2, 16, 24, dtype=torch.bfloat16), torch.zeros(2, 16, 8, dtype=torch.bfloat16))
    assert 0 < sum(piece.nbytes for piece in pack_output(made)) - batch.num_tokens * 4 * 8 * 2 < 256


def test_no_request_is_larger_than_the_servers_limit():
    ids = [0] * 500
    assert len(pack_batch(batch_of(*ids, document=1))) <= MAX_HEADER_BYTES + MAX_TOKEN_BYTES * len(ids)


def shifted(name, change):
    return {name: change(load(pack_batch(packed_batch()))[name])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": None}, "it holds"),
        ({"more": torch.zeros(1)}, "it holds"),
        ({"input_ids": torch.zeros(2, 15, dtype=torch.long)}, "shape"),
        ({"input_ids": torch.zeros(0, 16, dtype=torch.long)}, "shape"),
        ({"input_ids": torch.zeros(32, dtype=torch.long)}, "shape"),
        ({"input_ids": torch.zeros(2, 16)}, "dtypes"),
        ({"loss_mask": torch.zeros(2, 16, dtype=torch.long)}, "dtypes"),
        ({"positions": torch.zeros(2, 16, dtype=torch.int32)}, "dtypes"),
        ({"input_ids": torch.full((2, 16), VOCAB)}, "expected 0 to 49"),
        ({"input_ids": torch.full((2, 16), -1)}, "expected 0 to 49"),
        (shifted("positions", lambda p: p + 1), "positions"),
        (shifted("positions", lambda p: p * 2), "positions"),
        ({"spans": torch.zeros(1, 3)}, "spans"),
        ({"spans": torch.zeros(3, dtype=torch.long)}, "spans"),
        ({"spans": torch.tensor([[2, 0, 5]])}, "spans name"),
        ({"spans": torch.tensor([[0, 0, 17]])}, "spans name"),
        ({"spans": torch.tensor([[0, 5, 5]])}, "spans name"),
        ({"spans": torch.tensor([[0, -1, 5]])}, "spans name"),
        ({"spans": torch.tensor([[0, 1, 5]])}, "spans name"),
        ({"spans": torch.tensor([[0, 0, 4]])}, "spans name"),
        ({"spans": torch.tensor([[0, 0, 8]])}, "spans name"),
        ({"spans": torch.tensor([[0, 0, 6], [0, 5, 8]])}, "spans name"),
        ({"spans": torch.tensor([[0, 0, 5], [0, 0, 5]])}, "spans name"),
        ({"spans": torch.tensor([[0, 5, 8], [0, 0, 5]])}, "spans name"),
        ({"spans": torch.tensor([[1, 0, 16], [0, 0, 5]])}, "spans name"),
    ],
)
def test_invalid_batches_are_rejected(changes, message):
    with pytest.raises(FrameError, match=message):
        unpack_batch(frame_of(**changes), VOCAB)
    unpack_batch(frame_of(), VOCAB)


def test_spans_may_omit_documents():
    for spans in ([[0, 5, 8], [1, 0, 16]], [[0, 14, 16]], []):
        asked = torch.tensor(spans, dtype=torch.long).reshape(-1, 3)
        result = unpack_batch(frame_of(spans=asked), VOCAB)
        assert [[s.row, s.start, s.end] for s in result.spans] == spans


def test_bytes_that_are_no_frame_are_rejected():
    good, header = (
        pack_batch(packed_batch()),
        {"input_ids": {"dtype": "I64", "shape": [2, 16], "data_offsets": [0, 999]}},
    )
    text = json.dumps(header).encode()
    assert_rejected(b"", b"\x00" * 7, b"\xff" * 64, good[:-1], good + b"\x00", good[: len(good) // 2])
    assert_rejected((1 << 62).to_bytes(8, "little") + good[8:], len(text).to_bytes(8, "little") + text)
    assert_rejected(b"\x80\x04cos\nsystem\n(S'true'\ntR.")  # a pickle


def assert_rejected(*frames):
    for frame in frames:
        with pytest.raises(FrameError):
            unpack_batch(frame, VOCAB)


def test_damaged_headers_are_rejected_or_harmless():
    """Each byte of the header is replaced and removed."""
    good, chance = pack_batch(packed_batch()), random.Random(0)
    for at in range(int.from_bytes(good[:8], "little") + 8):
        for broken in (good[:at] + bytes([chance.randrange(256)]) + good[at + 1 :], good[:at] + good[at + 1 :]):
            with contextlib.suppress(FrameError):
                assert unpack_batch(broken, VOCAB).input_ids.shape == (2, 16)


@pytest.mark.parametrize("at", [0, 8, 30, 100])
def test_an_answer_of_another_layout_is_rejected(at):
    target, batch = StandIn(), batch_of(*range(8))
    layout, frame = (
        OutputLayout.of(batch, 4, TargetIdentity.of(target)),
        b"".join(pack_output(target.compute_hidden_states(batch))),
    )
    layout.read(filled(layout, frame))
    with pytest.raises(FrameError, match=r"expected .*F32"):
        layout.read(filled(layout, frame[:at] + b"?" + frame[at + 1 :]))


def test_identities_name_their_first_difference():
    one = TargetIdentity("f", "float32", [1, 3])
    assert one.difference(TargetIdentity("f", "float32", [1, 3])) is None
    assert one.difference(TargetIdentity("f", "bfloat16", [1, 3])) == "dtype is bfloat16 there and float32 here"
    tags = {
        TargetIdentity(*parts).tag
        for parts in (("f", "float32", [1, 3]), ("g", "float32", [1, 3]), ("f", "float32", [1]))
    }
    assert len(tags) == 3
