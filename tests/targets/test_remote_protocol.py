"""Frames: what is read is what was written, and what is no frame is refused without harm."""

import contextlib
import json
import random

import pytest
import torch
from safetensors.torch import load, save

from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.data.packing import collate
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
    """A good request with some of its tensors replaced."""
    tensors = load(pack_batch(packed_batch())) | changes
    return save({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_a_batch_arrives_as_it_was_sent_but_for_the_names_of_its_conversations():
    sent = packed_batch()
    found = unpack_batch(pack_batch(sent), VOCAB)
    assert all(torch.equal(getattr(found, n), getattr(sent, n)) for n in TENSORS)
    assert [(s.row, s.start, s.end) for s in found.spans] == [(s.row, s.start, s.end) for s in sent.spans]
    assert found.document_lengths() == sent.document_lengths() == [5, 3, 6, 2, 16]
    assert found.ids == ("",) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layers", [3, 0])
def test_a_supervision_is_a_safetensors_file_bit_by_bit(dtype, layers):
    """Read by safetensors itself: any bits, those of NaN and of infinity included."""
    width = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = torch.randint(torch.iinfo(width).min, torch.iinfo(width).max, (2, 16, 4 * 8), dtype=width)
    sent = TargetOutput(bits.view(dtype)[..., : layers * 8], bits.view(dtype)[..., -8:])
    frame = b"".join(pack_output(sent))
    layout = OutputLayout.of(packed_batch(), 8, TargetIdentity("", str(dtype)[6:], [0] * layers))
    found, ours = load(frame), layout.read(filled(layout, frame))
    for name, field in (("aux", "aux_hidden_states"), ("last_hidden", "last_hidden_state")):
        assert found[name].dtype == dtype
        for read in (found[name], getattr(ours, field)):
            assert torch.equal(read.view(width), getattr(sent, field).contiguous().view(width))


def filled(layout, frame):
    buffer = layout.allocate(pinned=False)
    buffer.numpy()[:] = list(frame)
    return buffer


def test_the_bytes_of_a_token_are_what_the_documentation_says():
    """(A + 1) * h numbers, and a header of a few."""
    batch = packed_batch()
    made = TargetOutput(torch.zeros(2, 16, 24, dtype=torch.bfloat16), torch.zeros(2, 16, 8, dtype=torch.bfloat16))
    assert 0 < sum(piece.nbytes for piece in pack_output(made)) - batch.num_tokens * 4 * 8 * 2 < 256


def test_no_request_is_larger_than_the_server_reads():
    ids = [0] * 500
    assert len(pack_batch(batch_of(*ids, document=1))) <= MAX_HEADER_BYTES + MAX_TOKEN_BYTES * len(ids)


def shifted(name, change):
    return {name: change(load(pack_batch(packed_batch()))[name])}


@pytest.mark.parametrize(
    ("changes", "said"),
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
def test_what_is_no_batch_is_refused(changes, said):
    with pytest.raises(FrameError, match=said):
        unpack_batch(frame_of(**changes), VOCAB)
    unpack_batch(frame_of(), VOCAB)


def test_spans_may_leave_documents_out():
    for spans in ([[0, 5, 8], [1, 0, 16]], [[0, 14, 16]], []):
        asked = torch.tensor(spans, dtype=torch.long).reshape(-1, 3)
        found = unpack_batch(frame_of(spans=asked), VOCAB)
        assert [[s.row, s.start, s.end] for s in found.spans] == spans


def test_bytes_that_are_no_frame_are_refused():
    good, header = (
        pack_batch(packed_batch()),
        {"input_ids": {"dtype": "I64", "shape": [2, 16], "data_offsets": [0, 999]}},
    )
    text = json.dumps(header).encode()
    assert_refused(b"", b"\x00" * 7, b"\xff" * 64, good[:-1], good + b"\x00", good[: len(good) // 2])
    assert_refused((1 << 62).to_bytes(8, "little") + good[8:], len(text).to_bytes(8, "little") + text)
    assert_refused(b"\x80\x04cos\nsystem\n(S'true'\ntR.")  # a pickle


def assert_refused(*frames):
    for frame in frames:
        with pytest.raises(FrameError):
            unpack_batch(frame, VOCAB)


def test_no_damage_makes_anything_else_than_a_refusal():
    """Each byte of the header changed, cut, doubled."""
    good, chance = pack_batch(packed_batch()), random.Random(0)
    for at in range(int.from_bytes(good[:8], "little") + 8):
        for broken in (good[:at] + bytes([chance.randrange(256)]) + good[at + 1 :], good[:at] + good[at + 1 :]):
            with contextlib.suppress(FrameError):
                assert unpack_batch(broken, VOCAB).input_ids.shape == (2, 16)


@pytest.mark.parametrize("at", [0, 8, 30, 100])
def test_an_answer_of_another_layout_is_refused(at):
    target, batch = StandIn(), batch_of(*range(8))
    layout, frame = (
        OutputLayout.of(batch, 4, TargetIdentity.of(target)),
        b"".join(pack_output(target.compute_hidden_states(batch))),
    )
    layout.read(filled(layout, frame))
    with pytest.raises(FrameError, match=r"expected .*F32"):
        layout.read(filled(layout, frame[:at] + b"?" + frame[at + 1 :]))


def test_an_identity_says_in_what_it_differs():
    one = TargetIdentity("f", "float32", [1, 3])
    assert one.difference(TargetIdentity("f", "float32", [1, 3])) is None
    assert one.difference(TargetIdentity("f", "bfloat16", [1, 3])) == "dtype is bfloat16 there and float32 here"
    tags = {
        TargetIdentity(*parts).tag
        for parts in (("f", "float32", [1, 3]), ("g", "float32", [1, 3]), ("f", "float32", [1]))
    }
    assert len(tags) == 3
