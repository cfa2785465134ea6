"""The launcher: rejected options, listening sockets, the rendezvous of nodes, restarts and signals."""

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
SLEEPING_WORKER = """
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


WORKER_THAT_DIES_OF_SIGTERM = """
import os, pathlib, signal, sys, time
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
signal.signal(signal.SIGTERM, signal.SIG_DFL if rank == "0" else lambda *_: os._exit(130))
pathlib.Path(sys.argv[1], f"started{rank}.{attempt}").write_text(rank)
time.sleep(60)
"""


UNLAUNCHED = """
import json, os, torch
from nemo_speculative.config.schema import ParallelismConfig
from nemo_speculative.distributed.parallelism import process_group
from tests.listening import listening, with_descendants
with process_group(torch.device("cpu"), ParallelismConfig()):
    torch.distributed.barrier()
    print(json.dumps([os.environ["GLOO_SOCKET_IFNAME"], sorted(address for _, address in listening(os.getpid()))]))
"""


def test_a_process_without_launcher_listens_on_the_loopback_only(tmp_path):
    script = tmp_path / "unlaunched.py"
    script.write_text(UNLAUNCHED)
    done = run_program(str(script), environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    interface, addresses = json.loads(done.stdout)
    assert interface == "lo" and set(addresses) <= {"127.0.0.1"}


@pytest.mark.parametrize(
    ("options", "message"),
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
            "--master-addr 198.51.100.1 is 198.51.100.1, but --interface lo of this node 0 has 127.0.0.1; set that",
        ),
        (["--rdzv-backend", "c10d"], "--rdzv-backend c10d .*: not supported by this launcher.*leave them out"),
        (["--rdzv-endpoint", "host:1"], "--rdzv-endpoint host:1: not supported by this launcher"),
    ],
)
def test_an_invalid_option_is_one_line(options, message, capsys):
    assert launch.main(["--nproc-per-node", "2", *options, "script.py"]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_an_interface_set_in_the_environment_is_kept(monkeypatch):
    monkeypatch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": "ib0"})
    network.bind_collectives_to("eth7")
    assert os.environ == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib0"}


@contextlib.contextmanager
def launched(tmp_path, *options, fails=None, worker=SLEEPING_WORKER, of_node=2):
    """The launcher over workers that create a file and then sleep; rank ``fails`` ends at once."""
    script = tmp_path / "worker.py"
    script.write_text(worker)
    command = ["-m", "nemo_speculative.launch", "--nproc-per-node", str(of_node), *options, str(script), str(tmp_path)]
    command += [fails] if fails else []
    with Program(*command, environment=ENVIRONMENT) as program:
        yield program


def wait_for(*files):
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_all_sockets_listen_on_the_loopback_and_sigterm_reaches_the_workers(tmp_path):
    with launched(tmp_path, "--stopped-status", "75") as program:
        wait_for(tmp_path / "started0.0", tmp_path / "started1.0")
        assert (tmp_path / "started0.0").read_text() == "lo"
        addresses = {address for _, address in listening(program.pid)}
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 75
    assert addresses == {"127.0.0.1"}
    assert (tmp_path / "stopped0").exists() and (tmp_path / "stopped1").exists()


@pytest.mark.parametrize(("options", "status"), [(["--stopped-status", "75"], 75), ([], 143)])
def test_workers_that_die_of_sigterm_are_not_restarted(options, status, tmp_path):
    """Workers do so during set-up: one by the signal, one with an exit status of its own."""
    with launched(tmp_path, "--max-restarts", "1", *options, worker=WORKER_THAT_DIES_OF_SIGTERM) as program:
        wait_for(tmp_path / "started0.0", tmp_path / "started1.0")
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == status
        assert not [line for line in program.stderr if line.startswith("error: ")]
    assert {file.name for file in tmp_path.glob("started*")} == {"started0.0", "started1.0"}


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_if_the_workers_of_one_node_die_of_sigterm_all_launchers_end_as_stopped(restarts, tmp_path, port):
    options = of_two_nodes(port, "--max-restarts", restarts)
    with (
        launched(tmp_path, *options, "--node-rank", "0", worker=WORKER_THAT_DIES_OF_SIGTERM, of_node=1) as first,
        launched(tmp_path, *options, "--node-rank", "1", worker=WORKER_THAT_DIES_OF_SIGTERM, of_node=1) as second,
    ):
        wait_for(tmp_path / "started0.0", tmp_path / "started1.0")
        second.send_signal(signal.SIGTERM)
        assert (first.wait(30), second.wait(30)) == (75, 75), [*first.stderr, *second.stderr]
    assert {file.name for file in tmp_path.glob("started*")} == {"started0.0", "started1.0"}


def test_sigterm_while_waiting_for_a_node_ends_the_launcher_as_stopped(tmp_path, port):
    with launched(tmp_path, *of_two_nodes(port, "--rdzv-id", "job"), "--node-rank", "0") as program:
        # Blocks until the launcher is in the rendezvous and handles signals.
        rendezvous(1, port)._round_store(0).get(launch.WORKERS)
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 75


def test_sigterm_while_waiting_for_node_0_ends_the_launcher_as_stopped(tmp_path, port):
    with launched(tmp_path, *of_two_nodes(port), "--node-rank", "1") as program:
        wait_until(lambda: handles(program.pid, signal.SIGTERM))
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 75


def handles(pid, number):
    """Whether the process has a handler for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(caught[1], 16) >> (number - 1) & 1)


def test_a_missing_node_0_is_one_line(tmp_path, port):
    with launched(tmp_path, *of_two_nodes(port, "--rdzv-conf", "timeout=1"), "--node-rank", "1") as program:
        assert program.wait(30) not in (0, 75)
        (line,) = program.stderr
    assert (
        f"did not meet, or one of them is gone (nothing listens at 127.0.0.1:{port} after 1 s: Connection refu" in line
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
        assert "torch/distributed/run.py" not in "".join(program.stderr)  # no traceback of the launcher
    assert len(workers) == 2 and not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_workers_are_restarted_and_the_one_that_failed_is_named(tmp_path):
    with launched(tmp_path, "--max-restarts", "1", fails="1") as program:
        assert program.wait(60) == 1
        errors = [line for line in program.stderr if line.startswith("error: ")]
    assert errors == ["error: rank 1 was the first to fail (exit status 7); its output is above\n"]
    assert {file.name for file in tmp_path.glob("started1.*")} == {"started1.0", "started1.1"}


FAILS = """
import os, pathlib, sys, time
from nemo_speculative.config.app import run_program
from nemo_speculative.utils.errors import PeerLostError, UserError
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
def program():
    pathlib.Path(sys.argv[1], "started" + rank + "." + attempt).touch()
    if rank == "1":
        while not pathlib.Path(sys.argv[1], "started0." + attempt).exists():
            time.sleep(0.01)
        raise {error}
    time.sleep(60)
run_program(program)
"""


@pytest.mark.parametrize(
    ("error", "starts", "message"),
    [
        ("UserError('data.path: bad')", 1, "rank 1 failed, and a restart would not help; its output is above"),
        ("PeerLostError('rank 0 is gone')", 2, "rank 1 was the first to fail (exit status 138); its output is above"),
        ("RuntimeError('CUDA error')", 2, "rank 1 was the first to fail (exit status 1); its output is above"),
    ],
)
def test_only_errors_that_a_restart_may_fix_cause_one(error, starts, message, tmp_path):
    with launched(tmp_path, "--max-restarts", "1", worker=FAILS.format(error=error)) as program:
        assert program.wait(60) == 1
        assert [line for line in program.stderr if line.startswith("error: ")][-1] == f"error: {message}\n"
    assert len(list(tmp_path.glob("started1.*"))) == starts


def test_a_mistyped_key_is_reported_once(tmp_path):
    recipe = ["recipes/train_eagle3.py", "trainer.x=1", f"output_dir={tmp_path / 'run'}"]
    options = ["--max-restarts", "2", "--nproc-per-node", "1"]
    done = run_program("-m", "nemo_speculative.launch", *options, *recipe, environment=ENVIRONMENT)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 2, errors
    assert "unknown key 'x'" in errors[0] and "a restart would not help" in errors[1]


def test_a_worker_that_must_not_be_restarted_ends_the_other_nodes(tmp_path, port):
    options = of_two_nodes(port, "--max-restarts", "1")
    worker = FAILS.format(error="UserError('bad')")
    with (
        launched(tmp_path, *options, "--node-rank", "0", worker=worker, of_node=1) as first,
        launched(tmp_path, *options, "--node-rank", "1", worker=worker, of_node=1) as second,
    ):
        assert (first.wait(60), second.wait(60)) == (138, 1), [*first.stderr, *second.stderr]
    assert {file.name for file in tmp_path.glob("started*")} == {"started0.0", "started1.0"}


def rendezvous(node, port, timeout=20, no_restart_file=Path("nowhere")):
    """The rendezvous of one of two nodes."""
    parameters = RendezvousParameters(
        launch.BACKEND, f"127.0.0.1:{port}", "job", 2, 2, local_addr="127.0.0.1", rank=node, timeout=timeout
    )
    return launch.FixedNodes(parameters, no_restart_file)


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
    """The next round of both nodes: the result of each, and a client of the workers' store."""
    infos = list(threads.map(lambda node: node.next_rendezvous(), nodes))
    assert [(info.rank, info.world_size) for info in infos] == [(0, 2), (1, 2)]
    (address,) = {(x.bootstrap_store_info.master_addr, x.bootstrap_store_info.master_port) for x in infos}
    assert address[0] == "127.0.0.1"
    return infos, dist.TCPStore(*address, timeout=timedelta(seconds=5))


def test_each_round_has_a_fresh_store(nodes, threads):
    infos, workers = meet(nodes, threads)
    infos[0].store.set("who", "first round")
    workers.set("address", "of a rank of this round")
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
    endpoint = info.bootstrap_store_info
    later = dist.TCPStore(endpoint.master_addr, endpoint.master_port, timeout=timedelta(seconds=5))
    assert not later.check(["address"]) and not info.store.check(["who"])
    assert [node.num_nodes_waiting() for node in nodes] == [0, 0]


def test_a_restarted_launcher_replaces_the_one_that_died(nodes, threads, port):
    first, died = nodes
    meet(nodes, threads)
    died._arrive()  # then it dies
    meeting = threads.submit(first.next_rendezvous)
    time.sleep(0.2)
    assert not meeting.done()
    assert rendezvous(1, port).next_rendezvous().rank == 1
    assert meeting.result().rank == 0 and first.num_nodes_waiting() == 0


def test_a_missing_node_is_named(port):
    with pytest.raises(RendezvousTimeoutError, match="missing after 1 s: node 1"):
        rendezvous(0, port, timeout=1).next_rendezvous()


def test_a_node_that_gives_up_ends_the_others(nodes, threads):
    meet(nodes, threads)
    nodes[1].shutdown()
    assert nodes[0].num_nodes_waiting() and nodes[0].is_closed()
    with pytest.raises(RendezvousClosedError, match="another node has given up"):
        nodes[0].next_rendezvous()


def test_all_nodes_learn_that_one_was_told_to_stop(nodes, threads):
    meet(nodes, threads)
    assert [node.num_nodes_waiting() for node in nodes] == [0, 0] and not nodes[0].check_stopped()
    nodes[1].stop()
    assert [node.num_nodes_waiting() for node in nodes] == [0, 0] and nodes[0].check_stopped()
    with pytest.raises(RendezvousClosedError, match="received a signal to stop"):
        nodes[0].next_rendezvous()


def test_a_node_that_waits_leaves_when_the_other_was_told_to_stop(nodes, threads):
    waiting = threads.submit(nodes[0].next_rendezvous)
    time.sleep(0.2)
    assert not waiting.done()
    nodes[1].stop()
    with pytest.raises(RendezvousClosedError, match="received a signal to stop"):
        waiting.result(10)


def test_an_occupied_port_is_named(nodes, port):
    with pytest.raises(UserError, match=f"--master-port {port} of 127.0.0.1: cannot listen there"):
        rendezvous(0, port)
