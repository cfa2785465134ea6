"""Prefetching: batches in the order of the loader, one ahead, and the target's outputs for them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemo_speculative.config.schema import DepthSampling, FeatureNoise
from nemo_speculative.data.batch import PackedLoader
from nemo_speculative.data.conversations import TokenRow
from nemo_speculative.data.tokenized_dataset import TokenizedDataset
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.training.prefetch import (
    BatchPrefetcher,
    InterruptedTargetError,
    TargetPrefetcher,
)
from nemo_speculative.utils.devices import StepTimer
from nemo_speculative.utils.errors import UserError
from tests.algorithms import cases
from tests.algorithms.cases import HIDDEN, VOCAB, FrozenStandIn, eagle, eagle3, lay_out, make_documents
from tests.observing import LargestTensor
from tests.target_servers import until

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA streams")


def make_loader(**shard):
    rows = [TokenRow(f"c{n}", [n % VOCAB] * (6 + n), [t > 2 for t in range(6 + n)], "") for n in range(11)]
    numbers = {"packed_length": 24, "global_batch_size": 4, "micro_batch_size": 2, "pad_id": 0, "seed": 3}
    return PackedLoader(TokenizedDataset(VOCAB, rows), **numbers, **shard)


@pytest.fixture
def prefetch():
    """Makes batch prefetchers, and closes them."""
    prefetchers = []

    def make(loader, objective=None):
        prefetchers.append(BatchPrefetcher(loader, objective or eagle3().make_objective(), CPU))
        return prefetchers[-1]

    yield make
    for prefetcher in prefetchers:
        prefetcher.close()


@pytest.mark.parametrize("shard", [{}, {"rank": 1, "world_size": 2}], ids=["one rank", "second of two ranks"])
def test_batches_come_in_the_order_of_the_loader(prefetch, shard):
    """Over several epochs; a batch has the loader's state right after it."""
    batches, loader, objective = prefetch(make_loader(**shard)), make_loader(**shard), eagle3().make_objective()
    for _ in range(9):
        batch, expected = batches.next(), loader.next_global_batch()
        assert [s.batch.ids for s in batch.schedules] == [b.ids for b in expected]
        for schedule, micro_batch in zip(batch.schedules, expected, strict=True):
            assert torch.equal(schedule.batch.input_ids, micro_batch.input_ids)
        assert torch.equal(batch.counts, sum(objective.schedule(b).counts for b in expected))
        assert batch.ids == tuple(name for b in expected for name in b.ids)
        assert batch.num_tokens == sum(b.input_ids.numel() for b in expected)
        assert batch.loader_state == loader.state_dict() and batch.epoch == loader.epoch
    assert batch.epoch > 1


def test_the_state_is_that_of_the_batch_in_use_though_the_thread_is_ahead(prefetch):
    loader = make_loader()
    batches = prefetch(loader)
    for step in range(1, 4):
        batch = batches.next()
        batches.peek()  # waits for the thread
        assert batch.loader_state == {"rows_consumed": 4 * step} and loader.rows_consumed == 4 * (step + 1)
    resumed = make_loader()
    resumed.load_state_dict(batch.loader_state)
    assert prefetch(resumed).next().ids == batches.next().ids


def test_peek_returns_the_next_batch(prefetch):
    batches = prefetch(make_loader())
    assert batches.peek() is batches.peek() is batches.next()
    assert batches.peek() is batches.next()


class FailingObjective:
    """Fails at the n-th micro-batch."""

    def __init__(self, at):
        self.objective, self.left = eagle3().make_objective(), at

    def schedule(self, batch, device):
        self.left -= 1
        if not self.left:
            raise RuntimeError("no such row")
        return self.objective.schedule(batch, device)


def test_an_error_in_the_thread_is_raised_for_its_batch(prefetch):
    batches = prefetch(make_loader(), FailingObjective(at=5))  # the third global batch
    batches.next()
    batches.next()
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"data: the next batch could not be made \(RuntimeError: no such row, test_"
        ):
            batches.next()


def test_close_ends_the_thread():
    before = set(threading.enumerate())
    batches = BatchPrefetcher(make_loader(), eagle3().make_objective(), CPU)
    batches.next()
    (thread,) = set(threading.enumerate()) - before
    batches.close()
    assert not thread.is_alive()


class LocalTarget:
    """Records the batches it computes; its outputs depend on the tokens, after some work on the device."""

    requests_ahead, collective = 0, False

    def __init__(self, device=CPU):
        random = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB, HIDDEN, generator=random).to(device)
        self.mix = torch.randn(HIDDEN, HIDDEN, generator=random).to(device) / HIDDEN**0.5
        self.computed = []

    def compute_hidden_states(self, batch):
        self.computed.append(batch.ids)
        hidden = self.table[batch.input_ids]
        for _ in range(50):
            hidden = torch.tanh(hidden @ self.mix)
        return TargetOutput(torch.cat([hidden] * 3, dim=-1), hidden)


def never():
    raise AssertionError("the next step's schedules are not needed")


def test_on_a_cpu_the_target_computes_each_micro_batch_when_it_is_needed(prefetch):
    target, schedules = LocalTarget(), prefetch(make_loader()).next().schedules
    targets = TargetPrefetcher(target, CPU, StepTimer(CPU))
    for n, (schedule, supervision) in enumerate(targets.iterate(schedules, never)):
        assert schedule is schedules[n] and len(target.computed) == n + 1
        assert torch.equal(
            supervision.last_hidden_state, LocalTarget().compute_hidden_states(schedule.batch).last_hidden_state
        )
    assert target.computed == [schedule.batch.ids for schedule in schedules]


class CollectiveTarget(LocalTarget):
    """Stands for a target that ranks compute together."""

    collective = True


def test_a_collective_target_is_synchronous_on_a_gpu():
    targets = TargetPrefetcher(CollectiveTarget(), torch.device("cuda"), StepTimer(CPU))
    assert targets.ahead == 0 and targets.stream is None


def test_a_targets_time_is_rank_local_unless_it_is_collective(prefetch):
    (schedule, *_), local = prefetch(make_loader()).next().schedules, {}
    for target in (LocalTarget(), CollectiveTarget()):
        timer = StepTimer(CPU)
        TargetPrefetcher(target, CPU, timer).compute_now(schedule.batch)
        times = timer.reset()
        local[target.collective] = times.local
        assert times.shares["target"] > 0
    assert local[False] > 0 and local[True] == 0


class RemoteTarget(LocalTarget):
    """A remote target that answers while its gate is open."""

    def __init__(self, requests_ahead):
        super().__init__()
        self.requests_ahead, self.gate, self.requests = requests_ahead, threading.Event(), 0

    def compute_hidden_states(self, batch):
        self.requests += 1
        assert self.gate.wait(20)
        return super().compute_hidden_states(batch)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_remote_target_is_requested_ahead_with_the_same_outputs_in_order(prefetch, depth):
    """Over three steps of two micro-batches: at most as many requests as it takes, and as there are batches."""
    target, plain, batches = RemoteTarget(depth), LocalTarget(), prefetch(make_loader())
    target.gate.set()
    targets, requested = TargetPrefetcher(target, CPU, StepTimer(CPU)), 0
    for step in range(3):
        schedules = batches.next().schedules
        for n, (schedule, supervision) in enumerate(targets.iterate(schedules, lambda: batches.peek().schedules)):
            assert schedule is schedules[n]
            assert torch.equal(
                supervision.last_hidden_state, plain.compute_hidden_states(schedule.batch).last_hidden_state
            )
            requested = 2 * step + n + 1 + min(depth, 3 - n)
            assert len(target.computed) <= requested
    until(lambda: len(target.computed) == requested)
    assert set(plain.computed) <= set(target.computed)
    targets.close()


def test_an_error_of_a_remote_target_is_raised_for_its_batch(prefetch):
    class FailingTarget(RemoteTarget):
        def compute_hidden_states(self, batch):
            raise RuntimeError("no server left")

    targets = TargetPrefetcher(FailingTarget(1), CPU, StepTimer(CPU))
    with pytest.raises(RuntimeError, match="no server left"):
        next(targets.iterate(prefetch(make_loader()).next().schedules, never))


def test_close_does_not_wait_for_a_server(prefetch):
    """Neither for one that does not answer, nor for requests that were not sent yet."""
    target, schedules = RemoteTarget(1), prefetch(make_loader()).next().schedules
    targets = TargetPrefetcher(target, CPU, StepTimer(CPU))
    with ThreadPoolExecutor(1) as trainer:
        first = trainer.submit(lambda: next(targets.iterate(schedules, never)))
        until(lambda: target.requests == 2)
        targets.close()
        assert not target.computed and not first.done()
        target.gate.set()
        assert first.result()[0] is schedules[0]


@pytest.fixture
def interrupt(prefetch, monkeypatch):
    """The error of a run that is stopped while it waits for ``target``."""
    monkeypatch.setattr("nemo_speculative.training.prefetch.STOP_SECONDS", 1.0)

    def run(target, wait):
        stop = threading.Event()
        targets = TargetPrefetcher(target, CPU, StepTimer(CPU), stop)
        with ThreadPoolExecutor(1) as trainer:
            waiting = trainer.submit(wait, targets, prefetch(make_loader()).next().schedules)
            until(lambda: target.requests)
            stop.set()
            error = waiting.exception(20)
        targets.close()
        target.gate.set()
        return error

    return run


@pytest.mark.parametrize(
    "wait",
    [lambda targets, s: next(targets.iterate(s, never)), lambda targets, s: targets.compute_now(s[0].batch)],
    ids=["training", "validation"],
)
def test_a_stopped_run_does_not_wait_for_a_server(interrupt, wait):
    error = interrupt(RemoteTarget(1), wait)
    assert isinstance(error, InterruptedTargetError) and error.exit_code == 130
    assert "interrupted" in str(error) and "resume=auto" in str(error)


def test_an_answer_soon_after_the_stop_is_used(interrupt):
    class QuickTarget(RemoteTarget):
        def compute_hidden_states(self, batch):
            self.requests += 1
            self.gate.wait(0.5)
            return LocalTarget.compute_hidden_states(self, batch)

    assert interrupt(QuickTarget(1), lambda targets, s: next(targets.iterate(s, never))) is None


def test_compute_now_leaves_pending_requests_in_order(prefetch):
    target, plain, batches = RemoteTarget(1), LocalTarget(), prefetch(make_loader())
    target.gate.set()
    targets = TargetPrefetcher(target, CPU, StepTimer(CPU))
    for _ in range(2):
        for schedule, supervision in targets.iterate(batches.next().schedules, lambda: batches.peek().schedules):
            assert torch.equal(
                supervision.last_hidden_state, plain.compute_hidden_states(schedule.batch).last_hidden_state
            )
            other = make_loader().next_global_batch()[1]
            assert torch.equal(
                targets.compute_now(other).last_hidden_state, plain.compute_hidden_states(other).last_hidden_state
            )
    targets.close()


@needs_cuda
def test_the_side_stream_gives_the_same_outputs_and_computes_one_ahead():
    cuda = torch.device("cuda")
    target, plain = LocalTarget(cuda), LocalTarget(cuda)
    batches = BatchPrefetcher(make_loader(), eagle3().make_objective(), cuda)
    try:
        targets, pairs = TargetPrefetcher(target, cuda, StepTimer(cuda)), []
        steps = [batches.next() for _ in range(2)]
        for step, coming in zip(steps, [steps[1], batches.peek()], strict=True):
            for schedule, supervision in targets.iterate(step.schedules, lambda coming=coming: coming.schedules):
                # The allocator's next block must not be that of the output.
                filled = torch.full_like(supervision.last_hidden_state, 7.0)
                pairs.append(
                    (
                        supervision.last_hidden_state + filled * 0,
                        plain.compute_hidden_states(schedule.batch).last_hidden_state,
                    )
                )
        assert all(torch.equal(output, expected) for output, expected in pairs)
        assert target.computed == [*plain.computed, batches.peek().schedules[0].batch.ids]
    finally:
        batches.close()


STEPS = {
    "eagle3": (eagle3(9), {}),
    "eagle3, sampled": (eagle3(), {"depth_sampling": DepthSampling.geometric}),
    "hass": (eagle(num_steps=3, topk_w=1.0), {}),
    "eagle1, noise": (eagle(noise=FeatureNoise.paper), {}),
}


def one_step(case, settings, device):
    """A function that computes the loss and its gradients once on ``device``."""
    ends = FrozenStandIn()
    ends.embedding, ends.head = ends.embedding.to(device), ends.head.to(device)
    draft, goal = case.make_draft().to(device).attach(ends), case.make_objective(**settings)
    goal.target = ends
    batch, supervision = lay_out([make_documents([40, 30]), make_documents([60], seed=1)], 72)
    schedule = goal.schedule(batch, device)
    supervision = TargetOutput(supervision.aux_hidden_states.to(device), supervision.last_hidden_state.to(device))
    return lambda: goal.loss(draft, schedule, supervision, schedule.counts).loss.backward()


@pytest.mark.parametrize(("case", "settings"), STEPS.values(), ids=STEPS)
def test_a_step_reads_no_tensor_on_the_host(case, settings):
    """Each read would synchronize with the device."""
    step = one_step(case, settings, CPU)
    with LargestTensor() as mode:
        step()
    assert mode.looks == 0
    with LargestTensor() as mode:
        torch.ones(2).sum().item()
    assert mode.looks == 1


@needs_cuda
@pytest.mark.parametrize(("case", "settings"), STEPS.values(), ids=STEPS)
def test_a_step_does_not_synchronize_with_the_device(case, settings, monkeypatch):
    monkeypatch.setitem(cases.NUMBERS, "head_dim", 16)  # the kernel's minimum
    step = one_step(case, settings, torch.device("cuda"))
    step()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
