"""``plan=true``: what a run would do, from configurations and text alone, without loading any weights."""

import sys
from pathlib import Path
from typing import Any

import torch

from nemo_speculative.algorithms.common.contract import DraftShape
from nemo_speculative.config.schema import Answers, TinyModelConfig, TrainJob
from nemo_speculative.data.batch import Batch, PackedLoader
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.tokenized_dataset import Tokenization, load_or_tokenize, preview
from nemo_speculative.data.vocab_mapping import build_vocab_mapping
from nemo_speculative.distributed.parallelism import num_ranks
from nemo_speculative.targets import demo
from nemo_speculative.targets.describe import describe_target
from nemo_speculative.targets.resolve import resolve_target
from nemo_speculative.training import estimate
from nemo_speculative.training.build import load_split
from nemo_speculative.training.checks import check_target, draft_shape
from nemo_speculative.utils.devices import choose_device


def describe(job: TrainJob) -> str:
    """Parameters, steps, tokens, time and memory per device, where it writes, and one example with its mask.

    Raises:
        UserError: whatever the run itself would refuse before it loads weights.
    """
    device = choose_device(job.trainer.device, "trainer.device")
    max_length, row_tokens = check_target(job)
    target = describe_target(job.model)
    config, tokenizer = target.config, target.tokenizer
    items, target_answers = load_split(job).training, job.data.answers is Answers.target
    tokenization = Tokenization(tokenizer, target.stop_ids, max_length, config.vocab_size)
    if target_answers:  # items that have an answer are representative of the others
        documents = tokenization([item for item in items if isinstance(item, TokenRow) or item.has_answer])
    else:
        documents = load_or_tokenize(items, tokenization, job.data, "tokenizing")
    entries = build_vocab_mapping(documents.all_counts, job.draft.vocabulary(config.vocab_size)).size
    shape = draft_shape(job, config, entries)
    models = estimate.size_models(job, config, shape)
    answered = f"the target answers them, at most {job.data.max_answer_tokens} tokens each; as given: "
    lines = [
        f"target    {_location(job)}: {models.target / 1e6:.1f} M parameters, {config.num_hidden_layers} layers, "
        f"{job.model.dtype.value}, aux layers {job.draft.chosen_aux_layers(config.num_hidden_layers)}",
        f"draft     {models.draft_parameters / 1e6:.1f} M parameters, {entries} of {config.vocab_size} "
        f"vocabulary ids, {job.draft.ttt_steps} steps, computed in {job.trainer.dtype.value}",
        f"layout    {_layout(job, models)}",
        f"data      {len(items)} read: {answered if target_answers else ''}{documents.report()}",
    ]
    loader = PackedLoader(  # of the first rank
        documents, packed_length=row_tokens, global_batch_size=job.trainer.global_batch_size,
        micro_batch_size=job.trainer.micro_batch_size, pad_id=0, seed=job.seed, world_size=job.data_ranks(num_ranks()),
    )  # fmt: skip
    rows = len(loader.rows_of(0))
    lines.append(f"training  {_steps_line(job, rows, row_tokens, documents.tokens)}")
    if rows:
        batches = loader.next_global_batch()
        counted = estimate.count(job, config, shape, batches, device, num_ranks())
        lines += _time_lines(job, models, config, shape, batches, counted, job.trainer.total_steps(rows), device)
        lines.append(_memory_line(job, models, counted, len(batches) > 1, device))
    else:
        lines.append("cost      not known before the target writes the answers")
    lines.append(f"writes    {Path(job.output_dir).resolve()}")
    if rows:
        color = sys.stdout.isatty()
        lines.append(f"example   (supervised tokens in {'green' if color else '⟦…⟧'})")
        lines.append(preview(documents.rows[0], tokenizer, color))
    return "\n".join(lines)


def _location(job: TrainJob) -> str:
    """The location of the target; the embedded one need not exist yet."""
    if not isinstance(job.model, TinyModelConfig):
        return str(resolve_target(job.model, weights=False))
    directory = demo.directory_of(job.model)
    return str(directory) if directory.exists() else "embedded, to be made"


def _layout(job: TrainJob, models: estimate.Models) -> str:
    """One line on the division of the draft and the target over the processes."""
    (replicate, shard), context = job.parallelism.sizes(num_ranks()), job.parallelism.context
    draft = "the draft whole" if shard * context == 1 else f"the draft in {shard * context} shards"
    copies = f", {replicate} times" if replicate > 1 else ""
    rows = f"; {context} share each row" if context > 1 else ""
    layers, sharded = job.backend.share_of_layers(num_ranks()), job.backend.SHARDS_EMBEDDING_AND_HEAD
    entries = layers * (models.target - models.embedding_and_head)
    entries += models.embedding_and_head * (layers if sharded else 1)
    if not layers:
        part = "the target's embedding and head"
    elif layers == 1:
        part = "the whole target"
    else:
        part = f"1/{round(1 / layers)} of the target" + ("" if sharded else "'s layers, and its embedding and head")
    size = _bytes(entries * getattr(torch, job.model.dtype.value).itemsize)
    return f"{num_ranks()} process(es): {draft}{copies}{rows}; each holds {part}, {size}"


def _steps_line(job: TrainJob, rows: int, row_tokens: int, tokens: int) -> str:
    if not rows and not job.trainer.max_steps:
        return "as many steps as the answers give, not known before the target writes them"
    steps, batch = job.trainer.total_steps(max(rows, 1)), job.trainer.global_batch_size
    about = "about " if job.data.answers is Answers.target else ""
    return (
        f"{steps} steps of {batch} rows of {row_tokens} tokens ({steps * batch * row_tokens / 1e6:.2f} M tokens), "
        f"{about}{rows} rows an epoch, {tokens / max(rows * row_tokens, 1):.0%} full"
    )


def _time_lines(
    job: TrainJob, models: estimate.Models, config: Any, shape: DraftShape, batches: list[Batch],
    counted: list[estimate.MicroBatch], steps: int, device: torch.device,
) -> list[str]:  # fmt: skip
    element, layer = job.model.dtype.value, (models.target - models.embedding_and_head) / models.num_layers
    # The draft with gradients and moments, a layer of the target, and its head.
    needed = 20 * models.draft_parameters + (layer + models.table) * getattr(torch, element).itemsize
    if needed > (free := _free_bytes(device)):
        piece = f"a piece of a step takes {_bytes(needed)}, and {_bytes(free)} of {device.type} are free"
        return [f"time      not known: {piece}"]
    rates = estimate.measure(job, config, shape, batches[0], counted[0], device)
    target, others = estimate.step_seconds(counted, rates, len(batches))
    times = {"online": target + others} if job.backend.share_of_layers(num_ranks()) else {}
    tokens = len(batches) * counted[0].tokens
    figures = "; ".join(
        f"{name} {_seconds(seconds)} a step, {tokens / seconds:.0f} tokens/s, {_seconds(steps * seconds)} in all"
        for name, seconds in {**times, "cached": others}.items()
    )
    where = f"{torch.get_num_threads()} thread(s)" if device.type == "cpu" else torch.cuda.get_device_name(device)
    left_out = f"{', communication' if num_ranks() > 1 else ''}{', torch.compile' if job.trainer.compile else ''}"
    mean = {part: sum(c.flops[part] for c in counted) / len(counted) * len(batches) / 2e9 for part in counted[0].flops}
    work = ", ".join(f"{part} {value:.3g}" for part, value in mean.items() if value)
    return [
        f"time      on this device ({where}), measured on a piece of a step: {figures}",
        "          (cached: without the target's forward, and before features are read; neither has validation,"
        f" checkpoints{left_out})",
        f"work      a step's multiply-adds on a rank, in 10^9: {work}",
    ]


def _memory_line(
    job: TrainJob, models: estimate.Models, counted: list[estimate.MicroBatch], accumulates: bool, device: torch.device
) -> str:
    largest, ranks = max(counted, key=lambda batch: batch.loss_bytes), num_ranks()
    online, cached = (
        estimate.peak_memory(job, models, largest, ranks, device.type, accumulates=accumulates, cached=cached)
        for cached in (False, True)
    )
    other = f", {_bytes(sum(cached.values()))} cached; online" if job.backend.share_of_layers(ranks) else ""
    parts = ", ".join(f"{part} {_bytes(size)}" for part, size in online.items() if size)
    overhead, size = estimate.overhead(online, device), _bytes(sum(online.values()))
    more = f"; allocator and libraries hold some {_bytes(overhead)} more" if overhead else ""
    return f"memory    about {size} of tensors a device on {ranks} rank(s){other}: {parts}{more}"


def _free_bytes(device: torch.device) -> float:
    """Free memory of the device; on a CPU what Linux calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _seconds(seconds: float) -> str:
    """The time in ms, s, min or h, by its size."""
    for limit, divisor, unit in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def _bytes(size: float) -> str:
    """The size in GB or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
