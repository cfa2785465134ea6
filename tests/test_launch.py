"""The launcher by itself: what it refuses, where it listens, and how nodes meet and part."""

import contextlib
import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousParameters, RendezvousTimeoutError

from nemo_speculative import launch
from nemo_speculative.utils import network
from nemo_speculative.utils.errors import UserError
from tests.listening import listening, with_descendants
from tests.programs import ROOT, Program, run_program

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SAY_AND_STAY = """
import os, pathlib, signal, sys, time
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
def stop(*_):
    pathlib.Path(sys.argv[1], "stopped" + rank).touch()
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], f"started{rank}.{attempt}").write_text(os.environ["GLOO_SOCKET_IFNAME"])
if sys.argv[2:] == [rank]:
    os._exit(7)
time.sleep(60)
"""


UNPREPARED = """
import os, pathlib, signal, sys, time
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
signal.signal(signal.SIGTERM, signal.SIG_DFL if rank == "0" else lambda *_: os._exit(130))
pathlib.Path(sys.argv[1], f"started{rank}.{attempt}").write_text(rank)
time.sleep(60)
"""


NO_CONTEXT_PARALLELISM = """
import json, os, torch
from nemo_speculative.config.schema import ParallelismConfig
from nemo_speculative.distributed.parallelism import process_group
from tests.listening import listening, with_descendants
with process_group(torch.device("cpu"), ParallelismConfig()):
    torch.distributed.barrier()
    print(json.dumps([os.environ["GLOO_SOCKET_IFNAME"], sorted(address for _, address in listening(os.getpid()))]))
"""


def test_a_process_that_nobody_launched_listens_on_the_loopback_and_has_no_store_there(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(NO_CONTEXT_PARALLELISM)
    done = run_program(str(script), environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    interface, addresses = json.loads(done.stdout)
    assert interface == "lo" and set(addresses) <= {"127.0.0.1"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nnodes", "1:2"], "--nnodes is 1:2: expected one number"),
        (["--nnodes", "many"], "--nnodes is many: expected one number"),
        (["--nnodes", "2", "--node-rank", "5", "--interface", "lo"], "--node-rank is 5: expected 0 to 1, because"),
        (["--nnodes", "2", "--node-rank", "-1"], "--node-rank is -1: expected 0 to 1, because --nnodes is 2"),
        (["--node-rank", "1"], "--node-rank is 1: expected 0 to 0, because --nnodes is 1"),
        (["--nproc-per-node", "some"], "--nproc-per-node is some: "),
        (["--nnodes", "2"], "--interface is not given: with several nodes name the network they share"),
        (["--interface", "nosuch0"], r"--interface nosuch0: no interface of this machine.* expected one of .*\blo\b"),
        (
            ["--nnodes", "2", "--interface", "lo", "--master-addr", "198.51.100.1"],
            "--master-addr 198.51.100.1 is 198.51.100.1, but --interface lo of this node 0 has 127.0.0.1; give that",
        ),
        (["--rdzv-backend", "c10d"], "--rdzv-backend c10d .*: not of this launcher.*leave them out"),
        (["--rdzv-endpoint", "host:1"], "--rdzv-endpoint host:1: not of this launcher"),
    ],
)
def test_what_cannot_be_had_is_one_line(options, said, capsys):
    assert launch.main(["--nproc-per-node", "2", *options, "script.py"]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line


def test_an_interface_that_the_environment_names_is_kept(monkeypatch):
    monkeypatch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": "ib0"})
    network.collect_on("eth7")
    assert os.environ == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib0"}


@contextlib.contextmanager
def launched(tmp_path, *options, fails=None, worker=SAY_AND_STAY, of_node=2):
    """The launcher over workers that say that they have started, and stay, but for rank ``fails``."""
    script = tmp_path / "worker.py"
    script.write_text(worker)
    command = ["-m", "nemo_speculative.launch", "--nproc-per-node", str(of_node), *options, str(script), str(tmp_path)]
    command += [fails] if fails else []
    with Program(*command, environment=ENVIRONMENT) as program:
        yield program


def wait_for(*files):
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))


def wait_until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_all_that_listens_is_on_the_loopback_and_sigterm_lets_the_workers_end_well(tmp_path):
    with launched(tmp_path, "--stopped-status", "75") as program:
        wait_for(tmp_path / "started0.0", tmp_path / "started1.0")
        assert (tmp_path / "started0.0").read_text() == "lo"
        found = {address for _, address in listening(program.pid)}
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 75
    assert found == {"127.0.0.1"}
    assert (tmp_path / "stopped0").exists() and (tmp_path / "stopped1").exists()


@pytest.mark.parametrize(("options", "status"), [(["--stopped-status", "75"], 75), ([], 143)])
def test_workers_that_die_of_sigterm_are_not_started_again(options, status, tmp_path):
    """So they do while they set up: one by the signal, one by a status of its own."""
    with launched(tmp_path, "--max-restarts", "1", *options, worker=UNPREPARED) as program:
        wait_for(tmp_path / "started0.0", tmp_path / "started1.0")
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == status
        assert not [line for line in program.stderr if line.startswith("error: ")]
    assert {file.name for file in tmp_path.glob("started*")} == {"started0.0", "started1.0"}


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_when_the_workers_of_one_node_die_of_sigterm_all_launchers_end_as_stopped(restarts, tmp_path, port):
    options = of_two_nodes(port, "--max-restarts", restarts)
    with (
        launched(tmp_path, *options, "--node-rank", "0", worker=UNPREPARED, of_node=1) as first,
        launched(tmp_path, *options, "--node-rank", "1", worker=UNPREPARED, of_node=1) as second,
    ):
        wait_for(tmp_path / "started0.0", tmp_path / "started1.0")
        second.send_signal(signal.SIGTERM)
        assert (first.wait(30), second.wait(30)) == (75, 75), [*first.stderr, *second.stderr]
    assert {file.name for file in tmp_path.glob("started*")} == {"started0.0", "started1.0"}


def test_sigterm_while_a_node_is_awaited_ends_the_launcher_as_stopped(tmp_path, port):
    with launched(tmp_path, *of_two_nodes(port, "--rdzv-id", "job"), "--node-rank", "0") as program:
        # Waits until the other is there, and hears signals.
        rendezvous(1, port)._of_round(0).get(launch.WORKERS)
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 75


def test_sigterm_while_node_0_is_awaited_ends_the_launcher_as_stopped(tmp_path, port):
    with launched(tmp_path, *of_two_nodes(port), "--node-rank", "1") as program:
        wait_until(lambda: handles(program.pid, signal.SIGTERM))
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 75


def handles(pid, number):
    """Whether that process has a handler for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(caught[1], 16) >> (number - 1) & 1)


def test_a_node_that_finds_no_node_0_says_one_line(tmp_path, port):
    with launched(tmp_path, *of_two_nodes(port, "--rdzv-conf", "timeout=1"), "--node-rank", "1") as program:
        assert program.wait(30) not in (0, 75)
        (line,) = program.stderr
    assert (
        f"did not meet, or one of them is gone (nobody listens at 127.0.0.1:{port} after 1 s: Connection refu" in line
    )


def of_two_nodes(port, *more):
    address = ["--master-addr", "127.0.0.1", "--master-port", str(port), "--interface", "lo"]
    return ["--nnodes", "2", *address, "--stopped-status", "75", *more]


def test_ctrl_c_ends_the_workers_and_the_launcher(tmp_path):
    with launched(tmp_path) as program:
        wait_for(tmp_path / "started0.0", tmp_path / "started1.0")
        workers = list(with_descendants(program.pid))[1:]
        program.send_signal(signal.SIGINT)
        assert program.wait(30) == 130
        assert "torch/distributed/run.py" not in "".join(program.stderr)  # no traceback of the launcher's
    assert len(workers) == 2 and not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_workers_are_started_again_and_the_one_that_failed_is_named(tmp_path):
    with launched(tmp_path, "--max-restarts", "1", fails="1") as program:
        assert program.wait(60) == 1
        errors = [line for line in program.stderr if line.startswith("error: ")]
    assert errors == ["error: rank 1 was the first to fail (exit status 7); what it said is above\n"]
    assert {file.name for file in tmp_path.glob("started1.*")} == {"started1.0", "started1.1"}


FAILS = """
import os, pathlib, sys, time
from nemo_speculative.config.app import run_program
from nemo_speculative.utils.errors import LostError, UserError
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
def program():
    pathlib.Path(sys.argv[1], "started" + rank + "." + attempt).touch()
    if rank == "1":
        raise {error}
    time.sleep(60)
run_program(program)
"""


@pytest.mark.parametrize(
    ("error", "starts", "said"),
    [
        ("UserError('data.path: bad')", 1, "rank 1 failed, and to start again would not help; what it said is above"),
        ("LostError('rank 0 is gone')", 2, "rank 1 was the first to fail (exit status 138); what it said is above"),
        ("RuntimeError('CUDA error')", 2, "rank 1 was the first to fail (exit status 1); what it said is above"),
    ],
)
def test_only_what_another_start_may_mend_is_started_again(error, starts, said, tmp_path):
    with launched(tmp_path, "--max-restarts", "1", worker=FAILS.format(error=error)) as program:
        assert program.wait(60) == 1
        assert [line for line in program.stderr if line.startswith("error: ")][-1] == f"error: {said}\n"
    assert len(list(tmp_path.glob("started1.*"))) == starts


def test_a_mistyped_key_is_said_once(tmp_path):
    recipe = ["recipes/train_eagle3.py", "trainer.x=1", f"output_dir={tmp_path / 'run'}"]
    options = ["--max-restarts", "2", "--nproc-per-node", "1"]
    done = run_program("-m", "nemo_speculative.launch", *options, *recipe, environment=ENVIRONMENT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 2, errors
    assert "unknown key 'x'" in errors[0] and "to start again would not help" in errors[1]


def test_a_node_whose_worker_is_not_to_be_started_again_ends_the_others(tmp_path, port):
    options = of_two_nodes(port, "--max-restarts", "1")
    worker = FAILS.format(error="UserError('bad')")
    with (
        launched(tmp_path, *options, "--node-rank", "0", worker=worker, of_node=1) as first,
        launched(tmp_path, *options, "--node-rank", "1", worker=worker, of_node=1) as second,
    ):
        assert (first.wait(60), second.wait(60)) == (138, 1), [*first.stderr, *second.stderr]
    assert {file.name for file in tmp_path.glob("started*")} == {"started0.0", "started1.0"}


def rendezvous(node, port, timeout=20, hopeless=Path("nowhere")):
    """That of one of two nodes."""
    parameters = RendezvousParameters(
        launch.BACKEND, f"127.0.0.1:{port}", "job", 2, 2, local_addr="127.0.0.1", rank=node, timeout=timeout
    )
    return launch.FixedNodes(parameters, hopeless)


@pytest.fixture
def port():
    return network.free_port()


@pytest.fixture
def nodes(port):
    return [rendezvous(node, port) for node in range(2)]


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def meet(nodes, threads):
    """The next round of both: what each was told, and a client of the workers' store."""
    infos = list(threads.map(lambda node: node.next_rendezvous(), nodes))
    assert [(info.rank, info.world_size) for info in infos] == [(0, 2), (1, 2)]
    (place,) = {(x.bootstrap_store_info.master_addr, x.bootstrap_store_info.master_port) for x in infos}
    assert place[0] == "127.0.0.1"
    return infos, dist.TCPStore(*place, timeout=timedelta(seconds=5))


def test_nodes_meet_again_in_a_store_without_what_was_before(nodes, threads):
    infos, workers = meet(nodes, threads)
    infos[0].store.set("who", "first round")
    workers.set("address", "of a rank that will be gone")
    assert infos[1].store.get("who") == b"first round"
    assert [node.num_nodes_waiting() for node in nodes] == [0, 0]
    early = threads.submit(nodes[1].next_rendezvous)
    deadline = time.monotonic() + 10
    while not nodes[0].num_nodes_waiting():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    meeting = threads.submit(nodes[0].next_rendezvous)
    info = early.result()
    assert meeting.result().rank == 0
    place = info.bootstrap_store_info
    later = dist.TCPStore(place.master_addr, place.master_port, timeout=timedelta(seconds=5))
    assert not later.check(["address"]) and not info.store.check(["who"])
    assert [node.num_nodes_waiting() for node in nodes] == [0, 0]


def test_a_launcher_that_was_started_again_takes_the_place_of_the_one_that_died(nodes, threads, port):
    first, died = nodes
    meet(nodes, threads)
    died._come()  # its last deed
    meeting = threads.submit(first.next_rendezvous)
    time.sleep(0.2)
    assert not meeting.done()
    assert rendezvous(1, port).next_rendezvous().rank == 1
    assert meeting.result().rank == 0 and first.num_nodes_waiting() == 0


def test_the_node_that_does_not_come_is_named(port):
    with pytest.raises(RendezvousTimeoutError, match="not there after 1 s: node 1"):
        rendezvous(0, port, timeout=1).next_rendezvous()


def test_a_node_that_gives_up_ends_the_others(nodes, threads):
    meet(nodes, threads)
    nodes[1].shutdown()
    assert nodes[0].num_nodes_waiting() and nodes[0].is_closed()
    with pytest.raises(RendezvousClosedError, match="another node has given up"):
        nodes[0].next_rendezvous()


def test_all_nodes_hear_that_one_was_asked_to_stop(nodes, threads):
    meet(nodes, threads)
    assert [node.num_nodes_waiting() for node in nodes] == [0, 0] and not nodes[0].hears_stop()
    nodes[1].stop()
    assert [node.num_nodes_waiting() for node in nodes] == [0, 0] and nodes[0].hears_stop()
    with pytest.raises(RendezvousClosedError, match="asked to stop"):
        nodes[0].next_rendezvous()


def test_a_node_that_waits_for_another_leaves_when_that_was_asked_to_stop(nodes, threads):
    waiting = threads.submit(nodes[0].next_rendezvous)
    time.sleep(0.2)
    assert not waiting.done()
    nodes[1].stop()
    with pytest.raises(RendezvousClosedError, match="asked to stop"):
        waiting.result(10)


def test_a_port_that_is_taken_is_named(nodes, port):
    with pytest.raises(UserError, match=f"--master-port {port} of 127.0.0.1: cannot listen there"):
        rendezvous(0, port)
