"""Trains a draft for a few minutes, serves it with the real SGLang, and compares it there with the target alone.

    python -m benchmarks.served --out DIR [--target MODEL --prompts FILE] [--device cuda --sglang-python PYTHON]

The target is a Hugging Face directory, or a model of random weights (--size) whose text a draft can learn; the draft is
trained on the target's own answers.  recipes/benchmark.py prints the table.  With random weights the acceptance length
is not that of real models; the speeds show the gain of such an acceptance length on this machine.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.processes import exit_status
from nemo_speculative.utils.errors import UserError

ROOT = Path(__file__).parents[1]
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096},
}  # fmt: skip
SPREAD, DAMPING = 1.2, 0.03
"""Spread of the weights, and factor of the layers' output projections, for text that neither repeats nor is random."""
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
TEMPLATE = "{% for m in messages %}{{ 't1 ' if m['role'] == 'user' else 't2 ' }}{{ m['content'] }} {% endfor %}t2 "
LONGEST_PROMPT, ASKED = 24, 32
"""Most words of a prompt, and number of prompts that are held out for the measurement."""


def random_target(directory: Path, size: str, device: str) -> Path:
    """A Llama of random weights, with a tokenizer of one word per id."""
    torch.manual_seed(0)
    shape = SIZES[size]
    ids = {"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    config = LlamaConfig(
        **shape, **ids, tie_word_embeddings=False, initializer_range=SPREAD / shape["hidden_size"] ** 0.5
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_(DAMPING)
    model.to(getattr(torch, DTYPES[device])).save_pretrained(directory)
    # No word may start with the name of a special token.
    names = {f"t{i}": i for i in range(shape["vocab_size"]) if i not in (0, 3)} | {"<pad>": 0, "</s>": 3}
    words = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>", bos_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def random_prompts(count: int, vocabulary: int) -> list[str]:
    """Random words of :func:`random_target`'s vocabulary."""
    draw = random.Random(0)
    return [
        " ".join(f"t{draw.randrange(4, vocabulary)}" for _ in range(draw.randint(4, LONGEST_PROMPT)))
        for _ in range(count)
    ]


def read_prompts(file: Path) -> list[str]:
    """The first user message of every conversation in a JSONL file.

    Raises:
        UserError: a line has none.
    """
    prompts = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        questions = [m["content"] for m in json.loads(line).get("conversations", []) if m.get("role") == "user"]
        if not questions:
            raise UserError(f'{file}:{number}: expected {{"conversations": [{{"role": "user", "content": …}}]}}')
        prompts.append(questions[0])
    return prompts


def write_prompts(directory: Path, prompts: Sequence[str]) -> tuple[Path, Path]:
    """Writes the conversations to train on, and the held-out prompts; returns both files."""
    held_out, training = prompts[:ASKED], prompts[ASKED:]
    train, questions = directory / "train.jsonl", directory / "questions.jsonl"
    rows = ({"conversations": [{"role": "user", "content": text}]} for text in training)
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in held_out))
    return train, questions


def train_command(options: argparse.Namespace, target: Path, data: Path) -> list[str]:
    dtype, answer = DTYPES[options.device], options.answer_tokens
    return [
        sys.executable, "recipes/train_eagle3.py", "model=local", f"model.path='{target}'", f"model.dtype={dtype}",
        "data=jsonl", f"data.path='{data}'", "data.answers=target", f"data.max_answer_tokens={answer}",
        f"data.cache_dir='{options.out / 'answers'}'", f"data.max_length={2 * answer + 64}", f"trainer.dtype={dtype}",
        f"trainer.device={options.device}", f"trainer.max_steps={options.steps}", "trainer.global_batch_size=8",
        f"trainer.save_interval={options.steps}", "optimizer.lr=1e-3", "draft.ttt_steps=5", "logger=none",
        "evaluation.num_questions=1", "evaluation.selection_questions=1", f"output_dir='{options.out / 'run'}'",
    ]  # fmt: skip


def benchmark_command(options: argparse.Namespace, questions: Path) -> list[str]:
    return [
        sys.executable, "recipes/benchmark.py", f"checkpoint='{options.out / 'run'}'", "suite=jsonl",
        f"suite.path='{questions}'", f"suite.max_new_tokens={options.answer_tokens}", f"server.device={options.device}",
        f"server.python='{options.sglang_python}'", f"concurrency={options.concurrency}", f"sweep={options.sweep}",
        "temperature=[0]", f"results='{options.out / 'benchmark'}'",
    ]  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Trains and measures the draft.

    Raises:
        UserError: a recipe failed.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.target or random_target(options.out / "target", options.size, options.device)
    count = options.conversations + ASKED
    prompts = (
        read_prompts(options.prompts) if options.prompts else random_prompts(count, SIZES[options.size]["vocab_size"])
    )
    data, questions = write_prompts(options.out, prompts[:count])
    for command in (train_command(options, target, data), benchmark_command(options, questions)):
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise UserError(f"{command[1]} failed, see above; the whole command: {' '.join(command)}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.served", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=lambda text: Path(text).resolve(), required=True, help="directory of all output")
    parser.add_argument("--target", type=Path, help="a Hugging Face directory; with --prompts")
    parser.add_argument("--prompts", type=Path, help="JSONL of conversations, whose first questions are used")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="size of a random target (default: tiny)")
    parser.add_argument("--device", choices=DTYPES, default="cpu", help="(default: cpu)")
    parser.add_argument("--steps", type=int, default=200, help="steps of the training (default: 200)")
    parser.add_argument("--conversations", type=int, default=1000, help="to train on (default: 1000)")
    parser.add_argument("--answer-tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--concurrency", default="[1,4]", help="(default: [1,4])")
    parser.add_argument("--sweep", default="[[3,1],[5,1],[4,4,16]]", help="steps, top-k, draft tokens (default: three)")
    parser.add_argument(
        "--sglang-python", default=sys.executable, help="Python of SGLang's environment (default: this one)"
    )
    options = parser.parse_args(argv)
    if bool(options.target) != bool(options.prompts):
        parser.error("--target and --prompts require each other: random prompts consist of a random target's words")
    return options


if __name__ == "__main__":
    raise SystemExit(exit_status(lambda: run(parse(None))))
