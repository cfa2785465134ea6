"""Hidden states under context parallelism equal those that one rank computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemo_speculative.data.batch import Batch, collate
from nemo_speculative.distributed.context_parallel import ContextGroup
from nemo_speculative.targets import document_attention
from nemo_speculative.targets.hf import HFTarget
from nemo_speculative.targets.sharded import FSDP2Target, TensorParallelTarget
from nemo_speculative.utils.errors import UserError
from tests.conftest import make_tokenizer
from tests.targets.test_document_attention import FAMILIES, draw
from tests.training.ranks import on_ranks

WHICH = ["llama", "qwen2", "mistral", "gemma3", "learned positions"]
ROWS = {
    "documents across the borders of chunks": ([[11, 7, 19], [40], [5, 3]], 40),
    "one document": ([[301]], 301),
    "many short ones": ([[3, 1, 4, 1, 5, 9, 2, 6, 5]], 50),
}
HALO = 3


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A random model of each family."""
    paths = {}
    for name in WHICH:
        paths[name] = str(tmp_path_factory.mktemp("family"))
        torch.manual_seed(0)
        model_type, config = FAMILIES[name]
        model_type(config).save_pretrained(paths[name])
        make_tokenizer().save_pretrained(paths[name])
    return paths


def batch_of(rows: str) -> Batch:
    lengths, width = ROWS[rows]
    return collate(draw(lengths), width, pad_id=1)


def world() -> ContextGroup:
    return ContextGroup(dist.group.WORLD, dist.new_group())


def shares(directories, scores):
    """This rank's output for each batch, and the flat positions of its tokens."""
    document_attention.MAX_MASK_ELEMENTS["cpu"] = scores
    context, result = world(), {}
    for name, directory in directories.items():
        target = HFTarget(directory, aux_layers=[0, 1, 2])
        for rows in ROWS:
            batch = batch_of(rows)
            shard = context.shard(batch.num_tokens, HALO)
            output = target.compute_hidden_states(replace(batch, shard=shard))
            places = shard.to_global(torch.arange(output.aux_hidden_states.shape[1]))
            result[f"{name}, {rows}"] = output.aux_hidden_states[0], output.last_hidden_state[0], places
    return result


@pytest.fixture(scope="module")
def result(directories):
    """Outputs of each rank, by the number of ranks: two with the largest masks, four with small ones."""
    return {2: on_ranks(2, shares, directories, 1 << 20), 4: on_ranks(4, shares, directories, 256)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", WHICH)
def test_hidden_states_are_those_of_one_rank(result, directories, name, ranks):
    target = HFTarget(directories[name], aux_layers=[0, 1, 2])
    for rows in ROWS:
        whole = target.compute_hidden_states(batch_of(rows))
        seen = torch.zeros(whole.aux_hidden_states.shape[:2].numel(), dtype=torch.bool)
        for aux, last_hidden_state, places in (rank[f"{name}, {rows}"] for rank in result[ranks]):
            for actual, reference in ((aux, whole.aux_hidden_states), (last_hidden_state, whole.last_hidden_state)):
                expected = reference.flatten(0, 1)[places]
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
            seen[places] = True
        assert seen.all()


def outputs_of_distributed_targets(directory):
    """This rank's output for a batch from each distributed target."""
    context, batch, result = world(), batch_of("documents across the borders of chunks"), []
    for placement in (FSDP2Target, TensorParallelTarget):
        shard = context.shard(batch.num_tokens, HALO)
        output = placement(Path(directory), aux_layers=[0, 1, 2]).compute_hidden_states(replace(batch, shard=shard))
        result.append(
            (
                output.aux_hidden_states[0],
                output.last_hidden_state[0],
                shard.to_global(torch.arange(output.aux_hidden_states.shape[1])),
            )
        )
    return result


def test_a_distributed_target_gives_each_rank_its_shard(directories):
    whole = HFTarget(directories["llama"], aux_layers=[0, 1, 2]).compute_hidden_states(
        batch_of("documents across the borders of chunks")
    )
    for of_rank in on_ranks(2, outputs_of_distributed_targets, directories["llama"]):
        for aux, last_hidden_state, places in of_rank:
            torch.testing.assert_close(aux, whole.aux_hidden_states.flatten(0, 1)[places], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                last_hidden_state, whole.last_hidden_state.flatten(0, 1)[places], rtol=1e-4, atol=1e-4
            )


def refusal(directory):
    target = HFTarget(directory, aux_layers=[0], attn_implementation="eager")
    batch = batch_of("one document")
    try:
        target.compute_hidden_states(replace(batch, shard=world().shard(batch.num_tokens, HALO)))
    except UserError as error:
        return str(error)
    return ""


def test_attention_over_whole_rows_is_rejected_under_context_parallelism(directories):
    for message in on_ranks(2, refusal, directories["llama"]):
        assert message.startswith("parallelism.context: LlamaForCausalLM with eager attention reads whole rows")
