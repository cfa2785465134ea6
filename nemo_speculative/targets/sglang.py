"""The target through SGLang's ModelRunner in this process, ``backend=sglang``.

Its kernels, its quantised weights and its tensor parallelism, for a target that is faster there, or that one GPU cannot
hold: every rank of the job takes part in the forward of every rank's batch, and keeps what belongs to its own.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_speculative.data.batch import Batch
from nemo_speculative.distributed.collectives import all_gather_ragged
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.targets.embedding_and_head import EmbeddingAndHead
from nemo_speculative.utils.errors import UserError

Place = tuple[int, int]
"""First token of a document and the one behind its last, of a batch's rows laid end to end."""


class SGLangTarget(EmbeddingAndHead):
    """A frozen model that SGLang runs; embedding and head are transformers' own, on every rank whole.

    Args:
        max_tokens: in one forward; documents longer than that are refused.
        flags: further ones of SGLang's server, such as ``--quantization``.
        ends: those of :class:`nemo_speculative.targets.embedding_and_head.EmbeddingAndHead`.

    Raises:
        UserError: see :class:`nemo_speculative.targets.sglang_runner.Runner`; or SGLang's logits are not the head's.
    """

    def __init__(self, path: Path, *, max_tokens: int = 16384, flags: Sequence[str] = (), **ends: Any):
        from nemo_speculative.targets.sglang_runner import Runner  # SGLang is imported for nobody else

        super().__init__(path, **ends)
        trusted = ["--trust-remote-code"] if self.trust_remote_code else []
        self.runner = Runner(
            self.path, aux_layers=self.aux_layers, dtype=self.dtype, device=self.device,
            max_tokens=max_tokens, flags=[*trusted, *flags],
        )  # fmt: skip
        self.collective = dist.is_initialized() and dist.get_world_size() > 1
        self._last: torch.cuda.Event | None = None
        self._check_head()

    def compute_hidden_states(self, batch: Batch) -> TargetOutput:
        """Positions that belong to no document are zeros."""
        with self._after_the_last():
            return self._supervise(batch).of(batch.shard)

    @contextlib.contextmanager
    def _after_the_last(self) -> Iterator[None]:
        """SGLang's cache is one for all forwards: on CUDA one must not begin beside another, on whatever stream."""
        if self.device.type != "cuda":
            yield
            return
        current = torch.cuda.current_stream(self.device)
        if self._last is not None:
            current.wait_event(self._last)
        yield
        self._last = current.record_event()

    def _supervise(self, batch: Batch) -> TargetOutput:
        places = _places(batch)
        # Of the host's: SGLang schedules there, and to ask the device would wait for all that it still has to do.
        flat = batch.on_host.input_ids.flatten().tolist()
        own = [flat[start:end] for start, end in places]
        found = [self._extended(texts, keep=texts is own) for texts in _of_all_ranks(own)]
        aux, hidden = next(kept for kept in found if kept is not None)
        rows, length = batch.input_ids.shape
        at = torch.cat([torch.arange(start, end) for start, end in places] or [torch.arange(0)]).to(aux.device)
        return TargetOutput(*(_laid_out(x, at, rows, length) for x in (aux, hidden)))

    def _extended(self, texts: Sequence[list[int]], keep: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
        """aux [N, A * h] and last hidden states [N, h] of the tokens of ``texts``; None for another rank's."""
        made = [self.runner.extend(some) for some in _portions(texts, self.runner.max_tokens)]
        if not keep:
            return None
        width, dtype = self.config.hidden_size, self.dtype
        empty = torch.zeros(0, width, dtype=dtype, device=self.device)
        aux = [empty.new_zeros(0, width * len(self.aux_layers)), *(part.aux_hidden_states for part in made)]
        return torch.cat(aux), torch.cat([empty, *(part.last_hidden_state for part in made)])

    @torch.no_grad()
    def _check_head(self) -> None:
        """SGLang may scale or cap what ends up as logits in its own way."""
        probe = [i % self.config.vocab_size for i in range(8)]
        found = self.runner.extend([probe])
        expected, ours = found.last_logits[0].float(), self.logits(found.last_hidden_state[-1]).float()
        if not torch.allclose(expected, ours, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise UserError(
                f"{self.path}: SGLang's logits are not the head applied to its last hidden state; this architecture is "
                "not supported by backend=sglang, try backend=hf"
            )


def _places(batch: Batch) -> list[Place]:
    """Its documents; what no span covers is padding."""
    length = batch.input_ids.shape[1]
    return [(span.row * length + span.start, span.row * length + span.end) for span in batch.spans]


def _of_all_ranks(own: list[list[int]]) -> Iterator[list[list[int]]]:
    """The documents of one rank after the other; this one's are ``own``."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield own
        return
    # As numbers: torch's collectives of objects unpickle what comes.
    packed = torch.tensor([len(own), *map(len, own), *chain.from_iterable(own)])
    for rank, numbers in enumerate(all_gather_ragged(packed)):
        yield own if rank == dist.get_rank() else _texts(numbers.tolist())


def _texts(numbers: list[int]) -> list[list[int]]:
    """From how many there are, how long each is, and their ids."""
    count, rest = numbers[0], iter(numbers[1:])
    lengths = list(islice(rest, count))
    return [list(islice(rest, length)) for length in lengths]


def _portions(texts: Sequence[list[int]], most: int) -> Iterator[list[list[int]]]:
    """Neighbouring texts of at most so many tokens together.

    Raises:
        UserError: one of them has more.
    """
    portion: list[list[int]] = []
    for text in texts:
        if len(text) > most:
            raise UserError(
                f"backend.max_tokens: a document has {len(text)} tokens, and SGLang's cache has room for {most}; raise "
                "backend.max_tokens, or lower data.max_length"
            )
        if sum(map(len, portion)) + len(text) > most:
            yield portion
            portion = []
        portion.append(text)
    if portion:
        yield portion


def _laid_out(x: torch.Tensor, at: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """[N, w] at the places [N] of [rows * length, w], as [rows, length, w]."""
    return x.new_zeros(rows * length, x.shape[-1]).index_copy_(0, at, x).unflatten(0, (rows, length))
