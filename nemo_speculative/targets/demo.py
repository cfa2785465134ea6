"""The embedded target: a small Llama that answers questions about the standard library, trained on first use.

With it everything from conversations to a served draft runs on a machine without a GPU, an account or a download.  It
is an ordinary Hugging Face directory; nothing downstream treats it specially.

Notable choices:
- rows of packed conversations that attend to each other, like a pre-training corpus: only the mechanics matter;
- Muon for the matrices, AdamW for the rest: with this budget AdamW alone never learns to copy a name from the question;
- stopped after a number of steps, never after seconds, so that two machines make the same target.
"""

import hashlib
import json
import random
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_speculative.config.schema import TinyModelConfig
from nemo_speculative.data.conversations import Conversation
from nemo_speculative.data.stdlib import stdlib_conversations
from nemo_speculative.utils.files import atomic_directory, dir_lock
from nemo_speculative.utils.progress import Progress, quiet_transformers

SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RECIPE_VERSION = 1
"""Part of the cache key; increase it when the conversations or the training change."""


def prepare_tiny(config: TinyModelConfig) -> Path:
    """The directory of the embedded target, trained on first use and cached by all settings that affect it."""
    directory = directory_of(config)
    if not directory.exists():
        # Another process that needs the target waits for this one, then finds it.
        with dir_lock(directory.parent, "model.cache_dir", wait=True):
            if not directory.exists():
                _make(config, directory)
                return directory
    print(f"embedded target: {directory} (made before)", flush=True)
    return directory


def _make(config: TinyModelConfig, directory: Path) -> None:
    training, held_out = stdlib_conversations(held_out=False), stdlib_conversations(held_out=True)
    print(f"embedded target: made once, on {len(training)} conversations from the standard library", flush=True)
    tokenizer = train_tokenizer(training, config.vocab_size)
    model = train_tiny(config, _rows(tokenizer, training, config))
    _print_quality(model, tokenizer, held_out, _rows(tokenizer, held_out, config))
    quiet_transformers()
    with atomic_directory(directory) as partial_directory:
        model.save_pretrained(partial_directory)
        tokenizer.save_pretrained(partial_directory)


def directory_of(config: TinyModelConfig) -> Path:
    """The cache directory of the target with this configuration, Python version and chat template."""
    settings = asdict(config)
    for name in ("cache_dir", "path", "revision", "dtype", "trust_remote_code"):
        del settings[name]
    # This module's former name: targets that earlier versions trained are found.
    settings["_target_"] = "nemo_speculative.targets.tiny.prepare_tiny"
    recipe = json.dumps([settings, TEMPLATE, RECIPE_VERSION, sys.version_info[:2]], sort_keys=True, default=str)
    return Path(config.cache_dir) / f"tiny-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def make_tokenizer(config: TinyModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of the embedded target."""
    return train_tokenizer(stdlib_conversations(held_out=False), config.vocab_size)


def train_tokenizer(conversations: list[Conversation], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template that marks the assistant's tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((m["content"] for c in conversations for m in c.messages), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>",
        extra_special_tokens=SPECIAL[2:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _rows(tokenizer: Any, conversations: list[Conversation], config: TinyModelConfig) -> torch.Tensor:
    """All conversations, shuffled once and cut into rows: int64 [rows, row_tokens]."""
    order, length = list(conversations), config.row_tokens
    random.Random(config.seed).shuffle(order)
    texts = tokenizer.apply_chat_template([c.messages for c in order], tokenize=False)
    ids = [i for text in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in text]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def llama_config(config: TinyModelConfig) -> LlamaConfig:
    """The architecture of the embedded target."""
    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.hidden_size // config.head_dim,
        num_key_value_heads=1, head_dim=config.head_dim, max_position_embeddings=config.context,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def train_tiny(config: TinyModelConfig, rows: torch.Tensor) -> LlamaForCausalLM:
    """Trains on ``rows`` [R, L] for ``config.steps`` steps of next-token cross-entropy.

    In bfloat16 autocast where the CPU has units for it; without them float32 is faster.
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(llama_config(config))
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    optimizers = [
        torch.optim.Muon(list(matrices.values()), lr=config.muon_lr, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(rest, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    factor = lambda step: min((step + 1) / config.warmup_steps, (config.steps - step) / config.steps)  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.empty(0, dtype=torch.long)
    progress = Progress("embedded target", config.steps)
    units = torch.cpu.get_capabilities()
    has_bfloat16 = any(units.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    for _ in range(config.steps):
        if len(order) < config.rows_per_step:
            order = torch.randperm(len(rows), generator=generator)
        batch, order = rows[order[: config.rows_per_step]], order[config.rows_per_step :]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress.advance(partial("loss {:.3f}".format, loss.detach()))
    progress.close()
    return model.eval()


@torch.no_grad()
def _print_quality(model: Any, tokenizer: Any, held_out: list[Conversation], rows: torch.Tensor) -> None:
    """Prints the loss on ``rows`` of held-out conversations, and answers to three of their questions."""
    losses = [model(batch, labels=batch, use_cache=False).loss.item() for batch in rows.split(16)]
    print(f"embedded target: held-out loss {sum(losses) / max(len(losses), 1):.3f} nats/token", flush=True)
    candidates = [c for c in held_out if c.id.endswith("/doc")]
    for conversation in random.Random(0).sample(candidates, min(3, len(candidates))):
        prompt = tokenizer.apply_chat_template(
            conversation.messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        print(f"  Q: {conversation.messages[0]['content']}\n  A: {text.strip()}", flush=True)
