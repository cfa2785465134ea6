"""What a step is fed: the stream's own order, one global batch ahead, and the target's outputs beside it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemo_speculative.config.schema import DepthSampling, FeatureNoise
from nemo_speculative.data.conversation import TokenRow
from nemo_speculative.data.loader import PackedLoader
from nemo_speculative.data.tokenized_dataset import TokenizedDataset
from nemo_speculative.targets.base import TargetOutput
from nemo_speculative.training.prefetch import BatchPrefetcher, Interrupted, InTurn, TargetPrefetcher
from nemo_speculative.training.step_timer import StepTimer
from nemo_speculative.utils.errors import UserError
from tests.algorithms.objectives import cases
from tests.algorithms.objectives.cases import HIDDEN, VOCAB, FrozenStandIn, eagle, eagle3, lay_out, make_documents
from tests.observing import LargestTensor
from tests.target_servers import until

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and synchronisation are CUDA's")


def stream(**where):
    rows = [TokenRow(f"c{n}", [n % VOCAB] * (6 + n), [t > 2 for t in range(6 + n)], "") for n in range(11)]
    numbers = {"row_tokens": 24, "global_batch_size": 4, "micro_batch_size": 2, "pad_id": 0, "seed": 3}
    return PackedLoader(TokenizedDataset(VOCAB, rows), **numbers, **where)


@pytest.fixture
def feeds():
    """Makes feeds, and closes them."""
    made = []

    def feed(source, objective=None):
        made.append(BatchPrefetcher(source, objective or eagle3().make_objective(), CPU))
        return made[-1]

    yield feed
    for one in made:
        one.close()


@pytest.mark.parametrize("where", [{}, {"rank": 1, "world_size": 2}], ids=["alone", "second of two ranks"])
def test_batches_come_in_the_order_of_the_stream(feeds, where):
    """Over several epochs; what is said of a batch is what the stream says right after it."""
    feed, expected, goal = feeds(stream(**where)), stream(**where), eagle3().make_objective()
    for _ in range(9):
        taken, batches = feed.take(), expected.next_global_batch()
        assert [s.batch.ids for s in taken.schedules] == [b.ids for b in batches]
        for schedule, batch in zip(taken.schedules, batches, strict=True):
            assert torch.equal(schedule.batch.input_ids, batch.input_ids)
        assert torch.equal(taken.counts, sum(goal.schedule(batch).counts for batch in batches))
        assert taken.ids == tuple(name for batch in batches for name in batch.ids)
        assert taken.num_tokens == sum(batch.input_ids.numel() for batch in batches)
        assert taken.state == expected.state_dict() and taken.epoch == expected.epoch
    assert taken.epoch > 1


def test_the_state_is_that_of_the_batch_in_use_though_the_thread_is_ahead(feeds):
    source = stream()
    feed = feeds(source)
    for step in range(1, 4):
        taken = feed.take()
        feed.peek()  # waits for the thread
        assert taken.state == {"rows_consumed": 4 * step} and source.rows_consumed == 4 * (step + 1)
    resumed = stream()
    resumed.load_state_dict(taken.state)
    assert feeds(resumed).take().ids == feed.take().ids


def test_peek_is_what_take_returns(feeds):
    feed = feeds(stream())
    assert feed.peek() is feed.peek() is feed.take()
    assert feed.peek() is feed.take()


class Breaks:
    """An objective that fails at the n-th micro-batch."""

    def __init__(self, at):
        self.goal, self.left = eagle3().make_objective(), at

    def schedule(self, batch, device):
        self.left -= 1
        if not self.left:
            raise RuntimeError("no such row")
        return self.goal.schedule(batch, device)


def test_an_error_in_the_thread_is_raised_where_its_batch_is_taken(feeds):
    feed = feeds(stream(), Breaks(at=5))  # the third global batch
    feed.take()
    feed.take()
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"data: the next batch could not be made \(RuntimeError: no such row, test_"
        ):
            feed.take()


def test_close_ends_the_thread():
    before = set(threading.enumerate())
    feed = BatchPrefetcher(stream(), eagle3().make_objective(), CPU)
    feed.take()
    (thread,) = set(threading.enumerate()) - before
    feed.close()
    assert not thread.is_alive()


class Reads:
    """A target that notes what it read; its outputs follow from the tokens, by way of some work on the device."""

    requests_ahead, collective = 0, False

    def __init__(self, device=CPU):
        random = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB, HIDDEN, generator=random).to(device)
        self.mix = torch.randn(HIDDEN, HIDDEN, generator=random).to(device) / HIDDEN**0.5
        self.read = []

    def compute_hidden_states(self, batch):
        self.read.append(batch.ids)
        hidden = self.table[batch.input_ids]
        for _ in range(50):
            hidden = torch.tanh(hidden @ self.mix)
        return TargetOutput(torch.cat([hidden] * 3, dim=-1), hidden)


def never():
    raise AssertionError("nobody asked for the next step")


def test_on_a_cpu_the_target_reads_each_micro_batch_when_its_turn_comes(feeds):
    target, schedules = Reads(), feeds(stream()).take().schedules
    ahead = TargetPrefetcher(target, CPU, StepTimer(CPU))
    for n, (schedule, supervision) in enumerate(ahead.over(schedules, never)):
        assert schedule is schedules[n] and len(target.read) == n + 1
        assert torch.equal(
            supervision.last_hidden_state, Reads().compute_hidden_states(schedule.batch).last_hidden_state
        )
    assert target.read == [schedule.batch.ids for schedule in schedules]


class Together(Reads):
    """A target that ranks compute together."""

    collective = True


def test_on_a_gpu_too_a_target_that_ranks_compute_together_has_its_turn():
    ahead = TargetPrefetcher(Together(), torch.device("cuda"), StepTimer(CPU))
    assert isinstance(ahead.asker, InTurn)


def test_what_a_target_computes_counts_as_a_ranks_own_unless_ranks_compute_it_together(feeds):
    (schedule, *_), found = feeds(stream()).take().schedules, {}
    for target in (Reads(), Together()):
        clock = StepTimer(CPU)
        InTurn(target, clock).start(schedule.batch)()
        lap = clock.reset()
        found[target.collective] = lap.local
        assert lap.shares["target"] > 0
    assert found[False] > 0 and found[True] == 0


class Waits(Reads):
    """A target elsewhere: it answers while its gate is open."""

    def __init__(self, requests_ahead):
        super().__init__()
        self.requests_ahead, self.gate, self.asked = requests_ahead, threading.Event(), 0

    def compute_hidden_states(self, batch):
        self.asked += 1
        assert self.gate.wait(20)
        return super().compute_hidden_states(batch)


@pytest.mark.parametrize("ahead_by", [1, 2, 3])
def test_a_target_elsewhere_is_asked_ahead_and_gives_the_same_in_the_same_order(feeds, ahead_by):
    """Over three steps of two micro-batches: never more ahead than it takes, nor than what is there."""
    target, plain, feed = Waits(ahead_by), Reads(), feeds(stream())
    target.gate.set()
    ahead, asked = TargetPrefetcher(target, CPU, StepTimer(CPU)), 0
    for step in range(3):
        schedules = feed.take().schedules
        for n, (schedule, supervision) in enumerate(ahead.over(schedules, lambda: feed.peek().schedules)):
            assert schedule is schedules[n]
            assert torch.equal(
                supervision.last_hidden_state, plain.compute_hidden_states(schedule.batch).last_hidden_state
            )
            asked = 2 * step + n + 1 + min(ahead_by, 3 - n)
            assert len(target.read) <= asked
    until(lambda: len(target.read) == asked)
    assert set(plain.read) <= set(target.read)
    ahead.close()


def test_what_a_target_elsewhere_fails_with_is_raised_where_it_is_taken(feeds):
    class Fails(Waits):
        def compute_hidden_states(self, batch):
            raise RuntimeError("no server left")

    ahead = TargetPrefetcher(Fails(1), CPU, StepTimer(CPU))
    with pytest.raises(RuntimeError, match="no server left"):
        next(ahead.over(feeds(stream()).take().schedules, never))


def test_closing_waits_for_no_server(feeds):
    """Neither for one that does not answer, nor for what was not asked yet."""
    target, schedules = Waits(1), feeds(stream()).take().schedules
    ahead = TargetPrefetcher(target, CPU, StepTimer(CPU))
    with ThreadPoolExecutor(1) as trainer:
        taking = trainer.submit(lambda: next(ahead.over(schedules, never)))
        until(lambda: target.asked == 2)
        ahead.close()
        assert not target.read and not taking.done()
        target.gate.set()
        assert taking.result()[0] is schedules[0]


@pytest.fixture
def interrupted(feeds, monkeypatch):
    """What is raised in a run that asks ``target`` and is told to stop meanwhile."""
    monkeypatch.setattr("nemo_speculative.training.prefetch.STOP_SECONDS", 1.0)

    def run(target, wait):
        stop = threading.Event()
        ahead = TargetPrefetcher(target, CPU, StepTimer(CPU), stop)
        with ThreadPoolExecutor(1) as trainer:
            waiting = trainer.submit(wait, ahead, feeds(stream()).take().schedules)
            until(lambda: target.asked)
            stop.set()
            error = waiting.exception(20)
        ahead.close()
        target.gate.set()
        return error

    return run


@pytest.mark.parametrize(
    "wait",
    [lambda ahead, some: next(ahead.over(some, never)), lambda ahead, some: ahead.at_once(some[0].batch)],
    ids=["training", "validation"],
)
def test_a_run_that_is_asked_to_stop_waits_for_no_server(interrupted, wait):
    error = interrupted(Waits(1), wait)
    assert isinstance(error, Interrupted) and error.exit_code == 130
    assert "interrupted" in str(error) and "resume=auto" in str(error)


def test_an_answer_that_comes_soon_after_it_is_taken(interrupted):
    class Soon(Waits):
        def compute_hidden_states(self, batch):
            self.asked += 1
            self.gate.wait(0.5)
            return Reads.compute_hidden_states(self, batch)

    assert interrupted(Soon(1), lambda ahead, some: next(ahead.over(some, never))) is None


def test_out_of_turn_nothing_is_mixed_up(feeds):
    target, plain, feed = Waits(1), Reads(), feeds(stream())
    target.gate.set()
    ahead = TargetPrefetcher(target, CPU, StepTimer(CPU))
    for _ in range(2):
        for schedule, supervision in ahead.over(feed.take().schedules, lambda: feed.peek().schedules):
            assert torch.equal(
                supervision.last_hidden_state, plain.compute_hidden_states(schedule.batch).last_hidden_state
            )
            other = stream().next_global_batch()[1]
            assert torch.equal(
                ahead.at_once(other).last_hidden_state, plain.compute_hidden_states(other).last_hidden_state
            )
    ahead.close()


@needs_cuda
def test_the_side_stream_gives_the_same_and_reads_one_ahead():
    cuda = torch.device("cuda")
    target, plain = Reads(cuda), Reads(cuda)
    feed = BatchPrefetcher(stream(), eagle3().make_objective(), cuda)
    try:
        ahead, sums = TargetPrefetcher(target, cuda, StepTimer(cuda)), []
        steps = [feed.take() for _ in range(2)]
        for step, coming in zip(steps, [steps[1], feed.peek()], strict=True):
            for schedule, supervision in ahead.over(step.schedules, lambda coming=coming: coming.schedules):
                # Whatever the allocator hands out next must not be what was just read.
                scribbled = torch.full_like(supervision.last_hidden_state, 7.0)
                sums.append(
                    (
                        supervision.last_hidden_state + scribbled * 0,
                        plain.compute_hidden_states(schedule.batch).last_hidden_state,
                    )
                )
        assert all(torch.equal(found, expected) for found, expected in sums)
        assert target.read == [*plain.read, feed.peek().schedules[0].batch.ids]
    finally:
        feed.close()


STEPS = {
    "eagle3": (eagle3(9), {}),
    "eagle3, sampled": (eagle3(), {"depth_sampling": DepthSampling.geometric}),
    "hass": (eagle(num_steps=3, topk_w=1.0), {}),
    "eagle1, noise": (eagle(noise=FeatureNoise.paper), {}),
}


def one_step(case, settings, device):
    """A function that computes the loss and its gradients once, everything being on ``device``."""
    ends = FrozenStandIn()
    ends.embedding, ends.head = ends.embedding.to(device), ends.head.to(device)
    draft, goal = case.make_draft().to(device).attach(ends), case.make_objective(**settings)
    goal.target = ends
    batch, supervision = lay_out([make_documents([40, 30]), make_documents([60], seed=1)], 72)
    schedule = goal.schedule(batch, device)
    supervision = TargetOutput(supervision.aux_hidden_states.to(device), supervision.last_hidden_state.to(device))
    return lambda: goal.loss(draft, schedule, supervision, schedule.counts).loss.backward()


@pytest.mark.parametrize(("case", "settings"), STEPS.values(), ids=STEPS)
def test_nothing_in_a_step_looks_at_a_tensor(case, settings):
    """Each look would wait for the device."""
    step = one_step(case, settings, CPU)
    with LargestTensor() as mode:
        step()
    assert mode.looks == 0
    with LargestTensor() as mode:
        torch.ones(2).sum().item()
    assert mode.looks == 1


@needs_cuda
@pytest.mark.parametrize(("case", "settings"), STEPS.values(), ids=STEPS)
def test_nothing_in_a_step_waits_for_the_device(case, settings, monkeypatch):
    monkeypatch.setitem(cases.NUMBERS, "head_dim", 16)  # the least that the kernel takes
    step = one_step(case, settings, torch.device("cuda"))
    step()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
