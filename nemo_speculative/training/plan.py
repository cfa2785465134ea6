"""``plan=true``: what a run would do, from configurations and text alone, without loading any weights."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from transformers import AutoModelForCausalLM

from nemo_speculative.config.schema import Answers, TinyModelConfig, TrainJob
from nemo_speculative.data.conversations import Conversation, TokenRow
from nemo_speculative.data.documents import Documents, preview, to_documents
from nemo_speculative.data.packing import pack
from nemo_speculative.data.vocabulary import build_vocabulary
from nemo_speculative.devices import choose_device
from nemo_speculative.drafts.base import Draft, DraftShape
from nemo_speculative.targets import tiny
from nemo_speculative.targets.hf import load_tokenizer, stop_ids, text_config
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.training.assembly import draft_shape, load_split, settle_draft

GB = 1e9
BYTES = {"float32": 4, "bfloat16": 2}


def describe(job: TrainJob) -> str:
    """Parameters, steps, tokens, memory per device, where it writes, and one example with its mask.

    Raises:
        UserError: whatever the run itself would refuse before it loads weights.
    """
    choose_device(job.trainer.device, "trainer.device")
    config, tokenizer, where = _target(job)
    settle_draft(job, config)
    max_length, row_tokens = job.data.lengths(config.max_position_embeddings)
    with torch.device("meta"):
        target_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    items = load_split(job).training
    documents = _tokenized(job, items, tokenizer, config, max_length)
    entries = build_vocabulary(documents.rows, job.draft.vocabulary(config.vocab_size), config.vocab_size).size
    shape = draft_shape(job, config, entries)
    aux = job.draft.chosen_aux_layers(config.num_hidden_layers)
    parameters = _num_parameters(get_class(job.draft._target_), shape)
    lines = [
        f"target    {where}: {target_parameters / 1e6:.1f} M parameters, {config.num_hidden_layers} layers, "
        f"{job.model.dtype.value}, aux layers {aux}",
        f"draft     {parameters / 1e6:.1f} M parameters, {entries} of {config.vocab_size} "
        f"vocabulary ids, {job.draft.num_steps} steps, computed in {job.trainer.dtype.value}",
        f"data      {len(items)} conversations: {_data_line(job, documents, items)}",
        f"training  {_steps_line(job, documents, row_tokens)}",
        *_memory_lines(job, shape, Sizes(target_parameters, parameters, entries, row_tokens)),
        f"writes    {Path(job.output_dir).resolve()}",
    ]
    if documents.rows:
        colour = sys.stdout.isatty()
        key = "green" if colour else "⟦…⟧"
        lines.append(f"example   (supervised tokens in {key})\n{preview(documents.rows[0], tokenizer, colour)}")
    return "\n".join(lines)


def _target(job: TrainJob) -> tuple[Any, Any, str]:
    """Configuration, tokenizer and name of the target; the embedded one need not exist yet."""
    if isinstance(job.model, TinyModelConfig):
        directory = tiny.directory_of(job.model)
        if not directory.exists():
            return tiny.llama_config(job.model), tiny.make_tokenizer(job.model), "embedded, to be made"
    else:
        directory = resolve_target(job.model, weights=False)
    trust = job.model.trust_remote_code
    return text_config(directory, trust), load_tokenizer(directory, trust), str(directory)


def _tokenized(
    job: TrainJob, items: list[Conversation | TokenRow], tokenizer: Any, config: Any, max_length: int
) -> Documents:
    if job.data.answers is Answers.target:  # those that have one already show what the others will be like
        items = [item for item in items if isinstance(item, TokenRow) or item.has_answer]
    return to_documents(items, tokenizer, stop_ids(config.eos_token_id, tokenizer), max_length, config.vocab_size)


def _data_line(job: TrainJob, documents: Documents, items: list[Conversation | TokenRow]) -> str:
    if job.data.answers is Answers.target:
        return (
            f"the target answers them, at most {job.data.max_answer_tokens} tokens each; as given: {documents.report()}"
        )
    return documents.report()


def _steps_line(job: TrainJob, documents: Documents, row_tokens: int) -> str:
    rows = len(pack([len(r.input_ids) for r in documents.rows], row_tokens, job.seed))
    if not rows and not job.trainer.max_steps:
        return "as many steps as the answers give, not known before the target writes them"
    steps, batch = job.trainer.total_steps(max(rows, 1)), job.trainer.global_batch_size
    fill = documents.tokens / max(rows * row_tokens, 1)
    about = "about " if job.data.answers is Answers.target else ""
    return (
        f"{steps} steps of {batch} rows of {row_tokens} tokens ({steps * batch * row_tokens / 1e6:.2f} M tokens), "
        f"{about}{rows} rows an epoch, {fill:.0%} full"
    )


def _num_parameters(draft: type[Draft], shape: DraftShape) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in draft(shape).parameters())  # type: ignore[call-arg]


@dataclass(frozen=True)
class Sizes:
    """What memory depends on beside the layer's shape."""

    target_parameters: int
    draft_parameters: int
    draft_vocab_size: int
    row_tokens: int


def _memory_lines(job: TrainJob, shape: DraftShape, sizes: Sizes) -> list[str]:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    shards = max(ranks // job.parallelism.replicate, 1) if job.parallelism.shard == -1 else job.parallelism.shard
    compute = BYTES[job.trainer.dtype.value]
    target = sizes.target_parameters * BYTES[job.model.dtype.value] / GB
    # float32 weights, gradients and two AdamW moments, sharded; the gathered copy and its gradient, whole.
    states = sizes.draft_parameters * 16 / shards / GB
    gathered = sizes.draft_parameters * (compute + compute) / GB if shards > 1 or compute < 4 else 0.0
    activations = _activation_bytes(job, shape, sizes, compute) / GB
    total = target + states + gathered + activations
    return [
        f"memory    about {total:.2f} GB a device on {ranks} rank(s): target {target:.2f}, draft and optimizer "
        f"{states + gathered:.2f}, activations {activations:.2f} (an estimate: all tokens supervised)"
    ]


def _activation_bytes(job: TrainJob, shape: DraftShape, sizes: Sizes, compute: int) -> float:
    """What an unroll keeps for its backward pass, were every token supervised."""
    rows = min(job.trainer.micro_batch_size, job.trainer.global_batch_size)
    tokens, steps = rows * sizes.row_tokens, job.draft.num_steps
    heads = shape.num_heads * shape.head_dim
    layer = shape.num_layers * tokens * compute * (8 * shape.hidden_size + 4 * heads + 4 * shape.intermediate_size)
    scores = shape.num_layers * rows * shape.num_heads * sizes.row_tokens**2 * (4 + compute)
    logits = tokens * sizes.draft_vocab_size * 4 * 2
    labels = tokens * sizes.draft_vocab_size * 4
    per_step = layer + scores + logits
    return labels + (per_step if job.trainer.activation_checkpointing else steps * per_step)
