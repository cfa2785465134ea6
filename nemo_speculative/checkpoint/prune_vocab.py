"""Pruning of a trained draft's vocabulary: rows of its head are removed, without further training."""

import dataclasses
from pathlib import Path

import torch
from hydra.utils import get_method

from nemo_speculative.checkpoint.draft_checkpoint import Servable, Tensors, read_servable, write_servable
from nemo_speculative.checkpoint.metadata import read_config
from nemo_speculative.config.schema import ModelConfig, PruneJob, VocabularySize, parse_vocab_size
from nemo_speculative.data.tokenized_dataset import Tokenization, load_or_tokenize
from nemo_speculative.data.vocab_mapping import entries_for_coverage
from nemo_speculative.targets.describe import describe_target
from nemo_speculative.utils.errors import UserError


def prune_checkpoint(job: PruneJob) -> str:
    """Writes ``<output>/model`` and returns the coverage table; raises UserError if the draft cannot be pruned."""
    servable, output = read_servable(job.checkpoint), Path(job.output).expanduser()
    if output.exists():
        raise UserError(f"output: {output} exists; choose another directory")
    counts = _counts(job, servable.provenance.target)
    entries = most_frequent_entries(servable, counts, parse_vocab_size(job.vocab_size, servable.shape.vocab_size))
    shape = dataclasses.replace(servable.shape, draft_vocab_size=len(entries))
    special_ids = {key: read_config(servable.directory).get(key) for key in ("bos_token_id", "eos_token_id")}
    write_servable(
        output / "model", servable.contract.draft, pruned_tensors(servable, entries), shape, servable.provenance,
        servable.dtype, special_ids,
    )  # fmt: skip
    return coverage_table(servable, counts, len(entries))


def _counts(job: PruneJob, target: str) -> torch.Tensor:
    """int64 [V]: occurrences of each target id in the assistant's turns of the job's data."""
    described = describe_target(ModelConfig(path=target))
    split = get_method(job.data._target_)(job.data, seed=0)
    max_length, _ = job.data.lengths(described.config.max_position_embeddings)
    tokenization = Tokenization(described.tokenizer, described.stop_ids, max_length, described.config.vocab_size)
    sides = (load_or_tokenize(side, tokenization, job.data, "tokenizing") for side in (split.training, split.held_out))
    return torch.stack([side.all_counts for side in sides]).sum(0)


def most_frequent_entries(servable: Servable, counts: torch.Tensor, size: VocabularySize) -> torch.Tensor:
    """int64 [n]: the draft ids of the most frequent target ids, ascending.

    Args:
        counts: int64 [V], occurrences of each target id in the assistant's turns.
    """
    if "d2t" not in servable.tensors:
        raise UserError(f"{servable.directory}: the draft has no vocabulary of its own; there is nothing to prune")
    own = counts[_target_ids(servable)]
    entries = size.entries if size.entries is not None else entries_for_coverage(own, size.coverage)
    if entries > len(own):
        raise UserError(f"vocab_size is {entries}: {servable.directory} has {len(own)} entries; choose fewer")
    return own.sort(descending=True, stable=True).indices[:entries].sort().values


def _target_ids(servable: Servable) -> torch.Tensor:
    d2t = servable.tensors["d2t"]
    return torch.arange(len(d2t)) + d2t


def pruned_tensors(servable: Servable, entries: torch.Tensor) -> Tensors:
    """The draft's tensors with only these ``entries`` of its vocabulary, int64 [n]."""
    ids, t2d = _target_ids(servable)[entries], torch.zeros_like(servable.tensors["t2d"])
    t2d[ids] = True
    head = servable.tensors["lm_head.weight"][entries]
    return servable.tensors | {"lm_head.weight": head, "d2t": ids - torch.arange(len(ids)), "t2d": t2d}


def coverage_table(servable: Servable, counts: torch.Tensor, marked: int) -> str:
    """The share of the assistant's tokens that the best 256, 512, … entries of the draft's vocabulary cover."""
    covered = counts[_target_ids(servable)].sort(descending=True).values.cumsum(0)
    total, whole = max(int(counts.sum()), 1), len(covered)
    doubled = [256 << n for n in range(whole.bit_length()) if 256 << n < whole]
    lines = ["  entries  coverage"]
    for entries in sorted({*doubled, marked, whole}):
        lines.append(f"{entries:9}  {int(covered[entries - 1]) / total:8.2%}{'  <-' if entries == marked else ''}")
    return "\n".join(lines)
