"""``backend=sglang``: the target through SGLang's ModelRunner in this process.

For a target that is faster with SGLang's kernels, is quantized, or does not fit one GPU: with several ranks it is
tensor-parallel over all of them, which compute the batch of each rank in turn.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.parallelism import all_gather_ragged
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.embedding_and_head import EmbeddingAndHead
from nemo_speculative.utils.errors import UserError


class SGLangTarget(EmbeddingAndHead):
    """A frozen model that SGLang runs; transformers' embedding and head are on every rank as a whole.

    Args:
        max_tokens: number of tokens in one forward pass; longer documents are refused.
        flags: further flags of SGLang's server, such as ``--quantization``.
        options: arguments of :class:`nemo_speculative.targets.embedding_and_head.EmbeddingAndHead`.

    Raises:
        UserError: see :class:`nemo_speculative.targets.sglang_runner.Runner`; or SGLang's logits are not the head's.
    """

    def __init__(self, path: Path, *, max_tokens: int = 16384, flags: Sequence[str] = (), **options: Any):
        from nemo_speculative.targets.sglang_runner import Runner  # needs SGLang, which no other backend does

        super().__init__(path, **options)
        trusted = ["--trust-remote-code"] if self.trust_remote_code else []
        self.runner = Runner(
            self.path, aux_layers=self.aux_layers, dtype=self.dtype, device=self.device,
            max_tokens=max_tokens, flags=[*trusted, *flags],
        )  # fmt: skip
        self.collective = dist.is_initialized() and dist.get_world_size() > 1
        self._last_forward: torch.cuda.Event | None = None
        self._check_head()

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """The states at padding are zeros."""
        with self._one_at_a_time():
            return self._compute(batch).shard(batch.shard)

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Orders forward passes of different CUDA streams: all use the same KV cache."""
        if self.device.type != "cuda":
            yield
            return
        current = torch.cuda.current_stream(self.device)
        if self._last_forward is not None:
            current.wait_event(self._last_forward)
        yield
        self._last_forward = current.record_event()

    def _compute(self, batch: Batch) -> TargetOutput:
        rows, length = batch.input_ids.shape
        ranges = [(span.row * length + span.start, span.row * length + span.end) for span in batch.spans]
        # From the host: SGLang schedules there, and reading the device would wait for all of its queued work.
        flat = batch.on_host.input_ids.flatten().tolist()
        own = [flat[start:end] for start, end in ranges]
        width, empty = self.config.hidden_size, torch.zeros(0, dtype=self.dtype, device=self.device)
        aux, hidden = [empty.new_zeros(0, width * len(self.aux_layers))], [empty.new_zeros(0, width)]
        for documents in _documents_of_all_ranks(own):
            for group in _groups(documents, self.runner.max_tokens):
                output = self.runner.forward(group)
                if documents is own:
                    aux.append(output.aux_hidden_states)
                    hidden.append(output.last_hidden_state)
        at = torch.cat([torch.arange(start, end) for start, end in ranges] or [torch.arange(0)]).to(self.device)
        return TargetOutput(*(_to_rows(torch.cat(x), at, rows, length) for x in (aux, hidden)))

    @torch.no_grad()
    def _check_head(self) -> None:
        """Refuses a model whose logits SGLang scales or caps in another way."""
        probe = [i % self.config.vocab_size for i in range(8)]
        output = self.runner.forward([probe])
        expected, logits = output.last_logits[0].float(), self.logits(output.last_hidden_state[-1]).float()
        if not torch.allclose(expected, logits, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise UserError(
                f"{self.path}: SGLang's logits are not the head applied to its last hidden state; this architecture is "
                "not supported by backend=sglang, try backend=hf"
            )


def _documents_of_all_ranks(own: list[list[int]]) -> Iterator[list[list[int]]]:
    """The documents of each rank in turn; this rank's are the object ``own``."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield own
        return
    # Packed as numbers (count, lengths, ids): torch's object collectives unpickle what they receive.
    packed = torch.tensor([len(own), *map(len, own), *chain.from_iterable(own)])
    for rank, numbers in enumerate(all_gather_ragged(packed)):
        count, *rest = numbers.tolist()
        lengths, ids = rest[:count], iter(rest[count:])
        yield own if rank == dist.get_rank() else [list(islice(ids, length)) for length in lengths]


def _groups(documents: Sequence[list[int]], max_tokens: int) -> Iterator[list[list[int]]]:
    """Consecutive documents of at most ``max_tokens`` tokens together.

    Raises:
        UserError: a document is longer.
    """
    group: list[list[int]] = []
    for document in documents:
        if len(document) > max_tokens:
            raise UserError(
                f"backend.max_tokens: a document has {len(document)} tokens, and SGLang's cache has room for "
                f"{max_tokens}; raise backend.max_tokens, or lower data.max_length"
            )
        if sum(map(len, group)) + len(document) > max_tokens:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _to_rows(x: torch.Tensor, at: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Scatters x [N, w] to the flat positions ``at`` [N]: → [rows, length, w], zeros elsewhere."""
    return x.new_zeros(rows * length, x.shape[-1]).index_copy_(0, at, x).unflatten(0, (rows, length))
