"""Speed and memory of the way from a JSONL file to rows of tokens, compared with the tokenizer alone.

python -m benchmarks.data_path [--lines 10000 100000] [--words 60] [--workers 2]

Conversations of random words are tokenized with a chat template and a byte-level BPE trained on these words.  "alone"
is the tokenizer's own batch call on the same texts, already rendered and in memory, on all cores.  Memory is the growth
of the process's anonymous memory (RssAnon, without mapped files) since before it opened the file.  Each number of lines
is measured in its own process.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmarks.processes import exit_status, last_line_of
from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data.batch import PackedLoader
from nemo_speculative.data.conversations import Conversation, ConversationFile, shuffled
from nemo_speculative.data.tokenized_dataset import Tokenization, load_or_tokenize
from nemo_speculative.targets.demo import train_tokenizer

VOCAB, ROW_TOKENS, BATCHES, SAMPLE = 4096, 2048, 20, 5000


def words() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]


def write_lines(file: Path, count: int, length: int) -> None:
    rng, known = random.Random(1), words()
    with file.open("w") as out:
        for number in range(count):
            texts = [" ".join(rng.choices(known, k=rng.randint(1, 2 * length))) for _ in range(2)]
            messages = [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
            out.write(json.dumps({"id": str(number), "conversations": messages}) + "\n")


def own_bytes() -> int:
    """Bytes of this process's anonymous memory, without mapped files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measured(count: int, length: int, workers: int) -> dict[str, float]:
    corpus = [Conversation("", [{"role": "user", "content": f" {word}"}], "") for word in words()]
    tokenizer = train_tokenizer(corpus, VOCAB)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "lines.jsonl"
        write_lines(file, count, length)
        tokenization = Tokenization(tokenizer, frozenset({tokenizer.eos_token_id}), ROW_TOKENS, VOCAB)
        config = DataConfig(path=str(file), cache_dir=directory, workers=workers)
        tokenization(list(ConversationFile(file)[:SAMPLE]))  # fills the tokenizer's caches
        before, times = own_bytes(), [time.perf_counter()]
        items = shuffled(ConversationFile(file), 0)
        times.append(time.perf_counter())
        documents = load_or_tokenize(items, tokenization, config, "tokenizing")
        times.append(time.perf_counter())
        documents = load_or_tokenize(items, tokenization, config, "tokenizing")
        times.append(time.perf_counter())
        stream = PackedLoader(
            documents, packed_length=ROW_TOKENS, global_batch_size=8, micro_batch_size=8, pad_id=0, seed=0
        )
        batches = [len(stream.next_global_batch()) for _ in range(1)]
        times.append(time.perf_counter())
        batches += [len(stream.next_global_batch()) for _ in range(BATCHES)]
        times.append(time.perf_counter())
        reading, tokenizing, again, first, batching = (b - a for a, b in pairwise(times))
        return {
            "lines": count, "file MB": file.stat().st_size / 1e6, "own MB": (own_bytes() - before) / 1e6,
            "reading s": reading, "tokenizing s": tokenizing, "from the cache s": again, "first rows s": first,
            "Mtokens/s": documents.tokens / (reading + tokenizing) / 1e6,
            "alone Mtokens/s": alone(tokenizer, items) / 1e6,
            "rows Mtokens/s": BATCHES * 8 * ROW_TOKENS / batching / 1e6,
        }  # fmt: skip


def alone(tokenizer, items) -> float:
    """Tokens per second of the tokenizer's own batch call."""
    messages = [item.messages for item in items[:SAMPLE] if isinstance(item, Conversation)]
    texts = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer(texts[:100])
    start = time.perf_counter()
    tokens = sum(map(len, tokenizer(texts)["input_ids"]))
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--words", type=int, default=60, help="mean number of words of a message")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        return print(json.dumps(measured(options.lines[0], options.words, options.workers)))
    shared = ["--case", "--words", str(options.words), "--workers", str(options.workers)]
    rows = [
        json.loads(last_line_of("benchmarks.data_path", [*shared, "--lines", str(count)], os.cpu_count() or 1))
        for count in options.lines
    ]
    print(f"{os.cpu_count()} cores, {options.workers} worker(s), {options.words} words a message on average")
    for name in rows[0]:
        print(f"{name:>18}" + "".join(f"{row[name]:>14,.2f}" for row in rows))
    shares = [row["Mtokens/s"] / row["alone Mtokens/s"] for row in rows]
    print(f"{'share of alone':>18}" + "".join(f"{share:>14.2f}" for share in shares))
    return None


if __name__ == "__main__":
    sys.exit(exit_status(partial(main)))
