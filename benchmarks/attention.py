"""Speed of the unroll's causal block, forward and backward: our pieces, torch's flash kernel and the dense form.

python -m benchmarks.attention [--rounds 9]

Half of a row's positions are slots (two answers).  The flash kernel receives the same queries with a mask, since it
does not accept ranges of keys.  Milliseconds of CPU time (all threads), medians of interleaved rounds; ratios are to
the flash kernel.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_speculative.algorithms.common.attention import Pair, block_for
from nemo_speculative.distributed.parallelism import fast_float32_matmuls

CPU = torch.device("cpu")
SHAPES = {
    "2 heads of 64, row of 512": (2, 1, 64, [512]),
    "8 heads of 64, row of 1024": (8, 4, 64, [1024]),
    "8 heads of 64, row of 4096": (8, 4, 64, [4096]),
    "8 heads of 64, 12 documents of 80": (8, 4, 64, [80] * 12),
}
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class DenseBlock:
    """The causal block in its readable form, a dense attention with a mask bool [n, m]."""

    visible: torch.Tensor

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        groups = q.unflatten(1, (len(keys), -1))
        scores = torch.einsum("nhgd,hmd->nhgm", groups, keys).float() * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~self.visible[:, None, None], float("-inf"))
        out = torch.einsum("nhgm,hmd->nhgd", scores.softmax(-1).to(values.dtype), values)
        return out.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)


def make_ways(heads: int, kv_heads: int, dim: int, lengths: list[int]) -> dict[str, Callable[[], object]]:
    """Calls that run forward and backward, by the name of the implementation."""
    positions = torch.cat([torch.arange(n) for n in lengths])
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    share = torch.cat([torch.arange(n) / n for n in lengths])
    index = (((share >= 0.35) & (share < 0.65)) | (share >= 0.8)).nonzero().squeeze(1)
    keys = torch.arange(len(positions))
    visible = (documents[index, None] == documents) & (keys <= index[:, None])
    q = torch.randn(len(index), heads, dim, requires_grad=True)
    k, v = (torch.randn(kv_heads, len(positions), dim, requires_grad=True) for _ in range(2))
    block, mask = block_for(positions, index, CPU), torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))

    def through(attend: Callable[..., Pair]) -> None:
        out, _ = attend(q, k, v)
        torch.autograd.grad(out.sum(), (q, k, v))

    def kernel() -> None:
        inputs = (q.detach().transpose(0, 1)[None], k.detach()[None], v.detach()[None])
        out, lse = flash(*inputs, 0.0, False, attn_mask=mask[None, None])
        flash_backward(torch.ones_like(out), *inputs, out, lse, 0.0, False, attn_mask=mask[None, None])

    return {
        "flash kernel": kernel,
        "pieces": lambda: through(block.attend),
        "dense": lambda: through(DenseBlock(visible).attend),
    }


def milliseconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return 1000 * (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    print(f"float32, torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds")
    with fast_float32_matmuls(CPU):
        for name, shape in SHAPES.items():
            ways = make_ways(*shape)
            for way in ways.values():
                way()
            measured = [{way: milliseconds(call) for way, call in ways.items()} for _ in range(rounds)]
            print(name)
            for way in ways:
                median = statistics.median(r[way] for r in measured)
                ratio = statistics.median(r[way] / r["flash kernel"] for r in measured)
                print(f"    {way:14}{median:9.1f} ms {ratio:6.2f}")


if __name__ == "__main__":
    main()
