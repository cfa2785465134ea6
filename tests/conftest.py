"""Small models that the tests make: nothing is downloaded."""

import os
import re
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it runs in the background so, and every program of a test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_speculative.targets.demo import TEMPLATE
from nemo_speculative.targets.hf import HFTarget

ROLES = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PREFIX_TEMPLATE = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""The same text without the tag: the assistant's part must be found by rendering prefixes."""
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box five dozen liquor jugs. " * 8


SLOW = (
    "integration/",
    "benchmarks/",
    "algorithms/common/test_context_parallel.py",
    "algorithms/common/test_position_skips.py::test_tau_at",
    "checkpoint/test_exports.py::TestRemoteCode",
    "config/test_builds.py",
    "config/test_groups.py::test_every_file_becomes",
    "config/test_refusals.py::test_the_recipe_prints",
    "config/test_start.py",
    "data/test_stored_dataset.py::test_a_killed_worker",
    "data/test_stored_dataset.py::test_workers_do_not_outlive",
    "decoding/test_distribution.py",
    "distributed/test_parallelism.py",
    "evaluation/server_benchmark/test_run.py",
    "evaluation/server_benchmark/test_scoring.py",
    "generate_data/test_generate.py",
    "generate_data/test_programs.py",
    "inspect_data/test_run.py",
    "prepare_data/test_recipe.py",
    "serving/test_containers.py",
    "serving/test_engine.py::test_an_answer_that_never_comes",
    "targets/cached/test_programs.py",
    "targets/cached/test_shards.py",
    "targets/test_context.py",
    "targets/test_demo.py",
    "targets/test_sharded.py",
    "test_launch.py",
    "test_serve_target.py",
    "training/test_checkpointer.py",
    "training/test_estimate.py",
    "training/test_optimizer.py",
    "training/test_plan.py",
    "utils/test_background.py",
)
"""Files, and beginnings of test names, that `make test` leaves out; each package keeps fast tests."""
MULTIPROCESS = re.compile(r"\b(on_ranks|drive|run_program|Popen|subprocess|multiprocessing)\b")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests as slow by ``SLOW``, and as multiprocess where their file starts processes."""
    sources: dict[Path, str] = {}
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        if MULTIPROCESS.search(sources.setdefault(item.path, item.path.read_text())):
            item.add_marker(pytest.mark.multiprocess)
        if any("CUDA" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Models this small are fastest on one thread, and sums then have one order."""
    torch.set_num_threads(1)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 ids: every byte, the roles and a few merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=ROLES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=ROLES[0], eos_token=ROLES[1], pad_token=ROLES[1], extra_special_tokens=ROLES[2:]
    )
    tokenizer.chat_template = template
    return tokenizer


def make_target(
    directory: Path, *, num_layers: int = 8, seed: int = 0, template: str | None = TEMPLATE, **config
) -> Path:
    """Saves a random Llama with a tokenizer.  Weights are larger than usual, so that its answers are not constant."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**(values | config)))
    model.save_pretrained(directory)
    make_tokenizer(template).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory) -> Path:
    """A random Llama of 8 layers of 32, as a Hugging Face directory."""
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def target(target_dir) -> HFTarget:
    """The same, loaded."""
    return HFTarget(target_dir, aux_layers=None)
