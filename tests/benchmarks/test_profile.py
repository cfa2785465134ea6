"""The profile of a training step."""

import pytest
import torch

from benchmarks.training_step.profile import PHASES, PRODUCTS, REST, PhaseTime, phase_times, profiled_steps, table

N, K, M = 5, 7, 11


def batched(*shape):
    return torch.ones(2, *shape)


@pytest.mark.parametrize(
    ("product", "flops"),
    [
        (lambda: torch.ones(N, K) @ torch.ones(K, M), 2 * N * K * M),
        (lambda: torch.mm(torch.ones(N, K), torch.ones(K, M), out=torch.empty(N, M)), 2 * N * K * M),
        (lambda: torch.addmm(torch.ones(M), torch.ones(N, K), torch.ones(K, M)), 2 * N * K * M),
        (lambda: torch.ones(N, M).addmm_(torch.ones(N, K), torch.ones(K, M)), 2 * N * K * M),
        (lambda: torch.bmm(batched(N, K), batched(K, M)), 4 * N * K * M),
        (lambda: torch.baddbmm(batched(N, M), batched(N, K), batched(K, M)), 4 * N * K * M),
        (lambda: batched(N, M).baddbmm_(batched(N, K), batched(K, M)), 4 * N * K * M),
        (lambda: torch.ones(N, K) * 2, 0),
    ],
)
def test_flops_of_a_product_are_counted(product, flops):
    time = phase_times(product)[REST]
    assert time.products_flops == flops
    assert (time.products_ms > 0) == (flops > 0) and time.products_ms <= time.ms


def test_every_phase_of_a_step_is_recorded(make_setup):
    first, second = profiled_steps(make_setup(), 2)
    assert set(first) == set(second) == {*PHASES, REST}
    assert all(time.ms > 0 for time in first.values())
    without = {name for name, time in first.items() if not time.products_flops}
    assert without == {"clipping and AdamW"}
    assert len(table([first, second])) == len(PHASES) + 3  # the head, the rest and the sum


def test_the_time_of_a_step_is_the_sum_of_its_phases():
    step = {name: PhaseTime(2.0, 1.0, 3e6) for name in (*PHASES, REST)}
    n = len(step)
    assert table([step])[-1].split() == ["step", str(2 * n), str(n), "3"]


def test_products_are_operators_of_torch():
    assert all(hasattr(torch.ops.aten, name.removeprefix("aten::").rstrip("_")) for name in PRODUCTS)
