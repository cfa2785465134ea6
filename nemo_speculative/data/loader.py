"""The data loader: rows are packed again for each epoch and dealt out in global batches.

A global batch does not depend on the number of ranks and micro-batches, and the only state is the number of rows
consumed, so a run resumes exactly on any number of ranks.
"""

from nemo_speculative.data.batch import Batch
from nemo_speculative.data.packing import PackedRows, collate, pack
from nemo_speculative.data.tokenized_dataset import TokenizedDataset


class PackedLoader:
    """Endless global batches of ``global_batch_size`` rows, of which each rank gets its part as micro-batches."""

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        packed_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        pad_id: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.documents, self.packed_length, self.pad_id, self.seed = dataset.rows, packed_length, pad_id, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.rows_consumed = 0
        self._lengths = dataset.lengths
        self._epochs: dict[int, PackedRows] = {}
        self._epoch, self._epoch_start = 0, 0

    def rows_of(self, epoch: int) -> PackedRows:
        """The packed rows of an epoch; those of the last two epochs requested are cached."""
        if epoch not in self._epochs:
            self._epochs = {e: rows for e, rows in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = pack(self._lengths, self.packed_length, seed=self.seed * 1_000_003 + epoch)
        return self._epochs[epoch]

    @property
    def epoch(self) -> int:
        """Pass over the data that the next row belongs to, from 0."""
        self._row_at(self.rows_consumed)
        return self._epoch

    def _row_at(self, index: int) -> list[int]:
        """Row ``index`` of the endless sequence of epochs (indices never decrease)."""
        while index - self._epoch_start >= len(self.rows_of(self._epoch)):
            self._epoch_start += len(self.rows_of(self._epoch))
            self._epoch += 1
        return self.rows_of(self._epoch)[index - self._epoch_start]

    def next_global_batch(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch: rows rank, rank + world_size, … of it."""
        indices = range(self.rows_consumed, self.rows_consumed + self.global_batch_size)
        rows = [(self._row_at(i), self._epoch) for i in indices][self.rank :: self.world_size]
        self.rows_consumed += self.global_batch_size
        chunks = [rows[i : i + self.micro_batch_size] for i in range(0, len(rows), self.micro_batch_size)]
        return [
            collate(
                [[self.documents[d] for d in row] for row, _ in chunk],
                self.packed_length,
                self.pad_id,
                [epoch for _, epoch in chunk],
            )
            for chunk in chunks
        ]

    def state_dict(self) -> dict[str, int]:
        return {"rows_consumed": self.rows_consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rows_consumed = state["rows_consumed"]
        self._epoch, self._epoch_start = 0, 0
