"""torchrun bound to one network interface: all sockets listen there, and nothing received is unpickled.

python -m nemo_speculative.launch --nproc-per-node 8 recipes/train_eagle3.py model=llama31_8b data=jsonl data.path=FILE
python -m nemo_speculative.launch --nnodes 2 --node-rank 0 --master-addr node0 --interface eth0 --nproc-per-node 8 \
    recipes/train_eagle3.py model=llama31_8b data=jsonl data.path=FILE

Options are torchrun's and two more: ``--interface``, by default the loopback for one node, and ``--stopped-status``.
torchrun itself listens on every interface, and its c10d rendezvous unpickles whatever a peer that can connect writes
there.  SIGTERM is passed on to the workers; they are not restarted after it, nor after an error that a restart would
only repeat.
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic import rendezvous as rdzv
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from nemo_speculative.utils.errors import NO_RESTART_FILE, PeerLostError, UsageError, UserError, print_error
from nemo_speculative.utils.network import FRESH_STORE, LOOPBACK, bind_collectives_to, bind_socket, ipv4_address

BACKEND = "one-interface"
DEFAULT_PORT = 29500
"""Default of torchrun's --master-port."""
COMPLETE_ROUNDS, CLOSED, STOPPED = "full", "closed", "stopped"
"""Store keys: the number of complete rounds; whether there will be no more; whether a node received a stop signal."""
ARRIVED, CONFIRMED, WORKERS = "nodes", "stays", "workers"
"""Store keys of a round: nodes that arrived, nodes that confirmed it, and the address of the workers' store."""
STOPPING = "a node received a signal to stop"
POLL_SECONDS = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the processes of this node and waits for them; returns the exit status."""
    try:
        args = _parser().parse_args(arguments)
        resolve_arguments(args)
        with tempfile.TemporaryDirectory(prefix="nemo_speculative_") as folder:
            return Launcher(args, Path(folder) / "no_restart").run()
    except UserError as error:
        print_error(error)
        return error.exit_code


class Launcher:
    """torchrun's agent on this node; workers create the file when a restart would not help."""

    def __init__(self, args: argparse.Namespace, no_restart_file: Path):
        self._args, self._no_restart_file = args, no_restart_file
        self._rendezvous: FixedNodes | None = None

    def run(self) -> int:
        """Runs until the workers have ended; returns the exit status.  Raises UserError if a worker or node failed."""
        bind_collectives_to(self._args.interface)
        os.environ.update({FRESH_STORE: "1", NO_RESTART_FILE: str(self._no_restart_file)})
        rdzv.rendezvous_handler_registry.register(BACKEND, self._create_rendezvous)
        status = 0
        try:
            torchrun.run(self._args)
        except SignalException as error:
            status = 128 + error.sigval
            if error.sigval != signal.SIGTERM:
                return status
        except (ChildFailedError, rdzv.RendezvousError, dist.DistError) as error:
            if not (self._rendezvous and self._rendezvous.check_stopped()):
                raise self._failure(error) from None
            # A run that is not in its training loop has nothing to save: SIGTERM kills it.
            status = 128 + signal.SIGTERM
        stopped = status or (self._rendezvous and self._rendezvous.stopped)
        return self._args.stopped_status if stopped and self._args.stopped_status is not None else status

    def _failure(self, error: Exception) -> UserError:
        """The error that a user reads for the one that torch's agent raised."""
        if isinstance(error, ChildFailedError):
            rank, failure = error.get_first_failure()
            reason = f"killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
            return UserError(f"rank {rank} was the first to fail ({reason}); its output is above")
        if self._no_restart_file.exists():
            failed = self._no_restart_file.read_text().split()[0]
            return UserError(f"rank {failed} failed, and a restart would not help; its output is above")
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return PeerLostError(
            f"the {self._args.nnodes} node(s) did not meet, or one of them is gone ({first}); start this on "
            "every node with its own --node-rank and the same --nnodes, --master-addr and --master-port"
        )

    def _create_rendezvous(self, parameters: rdzv.RendezvousParameters) -> rdzv.RendezvousHandler:
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self._rendezvous = FixedNodes(parameters, self._no_restart_file)
        return self._rendezvous

    def _on_sigterm(self, number: int, _: object) -> None:
        """Passes the signal on to the workers; without workers there is nothing to save."""
        if self._rendezvous:
            self._rendezvous.stop()
        tasks = Path("/proc/self/task").iterdir()
        workers = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        if not workers:
            raise SignalException("no workers to pass it on to", sigval=signal.Signals(number))
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _parser() -> argparse.ArgumentParser:
    parser = torchrun.get_args_parser()
    parser.prog = "python -m nemo_speculative.launch"
    parser.description = "torchrun, with all listening sockets bound to one network interface"
    parser.add_argument("--interface", help="network interface; the loopback where there is one node")
    parser.add_argument(
        "--stopped-status", type=int, metavar="STATUS",
        help="exit status on every node after SIGTERM to one of them; by default 0 if the workers end well, else 143",
    )  # fmt: skip
    return parser


def resolve_arguments(args: argparse.Namespace) -> None:
    """Sets those of torchrun's arguments that this launcher decides; raises UserError if the given ones are invalid."""
    nodes, _, most = args.nnodes.partition(":")
    if not nodes.isdecimal() or int(nodes) < 1 or (most or nodes) != nodes:
        raise UsageError(f"--nnodes is {args.nnodes}: expected one number, above 0; the nodes of a job are fixed")
    try:
        torchrun.determine_local_world_size(args.nproc_per_node)
    except ValueError as error:
        raise UsageError(f"--nproc-per-node is {args.nproc_per_node}: {error}") from None
    if args.rdzv_backend != "static" or args.rdzv_endpoint:
        raise UsageError(
            f"--rdzv-backend {args.rdzv_backend} --rdzv-endpoint {args.rdzv_endpoint}: not supported by this launcher, "
            "whose nodes meet at --master-addr and --master-port; leave them out"
        )
    if not args.standalone and not 0 <= args.node_rank < int(nodes):
        last = int(nodes) - 1
        raise UsageError(f"--node-rank is {args.node_rank}: expected 0 to {last}, because --nnodes is {nodes}")
    single_node = args.standalone or nodes == "1"
    if not single_node and not args.interface:
        raise UsageError("--interface is not given: with several nodes name the network they share, e.g. eth0")
    args.interface = args.interface or LOOPBACK
    args.local_addr = ipv4_address(args.interface, "--interface")
    if single_node:
        args.nnodes, args.node_rank = "1", 0
        host, port = args.local_addr, args.master_port or 0
    else:
        args.nnodes = nodes
        host, port = args.master_addr, args.master_port or DEFAULT_PORT
    if args.node_rank == 0:
        _check_master(host, args)
    args.rdzv_backend, args.rdzv_endpoint = BACKEND, f"{host}:{port}"
    args.rdzv_conf = ",".join(filter(None, (args.rdzv_conf, f"rank={args.node_rank}")))
    # On SIGTERM a run saves first: this launcher passes the signal on, instead of torchrun's agent, which would kill.
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    args.standalone, args.node_rank = False, 0


def _check_master(host: str, args: argparse.Namespace) -> None:
    """Raises UsageError if the other nodes would connect to another address than the one on which this one listens."""
    with contextlib.suppress(OSError):  # a host name that only the other nodes can resolve
        address = socket.gethostbyname(host)
        if address != args.local_addr and not address.startswith("127."):
            raise UsageError(
                f"--master-addr {host} is {address}, but --interface {args.interface} of this node 0 has "
                f"{args.local_addr}; set that as --master-addr on all nodes"
            )


class FixedNodes(rdzv.RendezvousHandler):
    """Rendezvous of a fixed number of nodes, repeated whenever the workers of one of them have failed.

    Node 0 hosts a store for the agents, and a fresh one for the workers of each round.  A round is complete when every
    node has arrived; a node that waits in the next round makes the others leave the current one.

    Args:
        parameters: endpoint, where node 0 listens; local_addr, this node's address; rank, this node's number; timeout,
            the seconds within which all nodes have to arrive.
        no_restart_file: file that workers create when a restart would not help; this node then does not return.
    """

    use_agent_store = True  # workers connect to the store that this node's agent names, and do not listen themselves

    def __init__(self, parameters: rdzv.RendezvousParameters, no_restart_file: Path):
        self._address, self._run_id = cast(str, parameters.local_addr), parameters.run_id
        self._no_restart_file, self._round = no_restart_file, 0
        self._node, self._nodes = cast(int, parameters.get_as_int("rank")), parameters.max_nodes
        self._timeout = timedelta(seconds=cast(int, parameters.get_as_int("timeout")))
        host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=DEFAULT_PORT)
        store = self._serve_store(port) if self._node == 0 else self._connect(host, port)
        self._agents = dist.PrefixStore(self._run_id, store)
        self._workers: dist.TCPStore | None = None
        self.stopped = False
        """Whether a node received a signal to stop, as known to this node."""

    def _serve_store(self, port: int) -> dist.TCPStore:
        """A store that listens on this node's own address; torch by itself would listen on all."""
        with bind_socket(self._address, port, f"--master-port {port} of {self._address}") as listener:
            listener.listen()
            actual_port = listener.getsockname()[1]
            return dist.TCPStore(
                self._address, actual_port, is_master=True, timeout=self._timeout, wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )  # fmt: skip

    def _connect(self, host: str, port: int) -> dist.TCPStore:
        """Connects to node 0's store, after waiting for its port: torch would print warnings meanwhile."""
        deadline = time.monotonic() + self._timeout.total_seconds()
        while True:
            try:
                with socket.create_connection((host, port), max(deadline - time.monotonic(), POLL_SECONDS)):
                    return dist.TCPStore(host, port, timeout=self._timeout)
            except OSError as error:
                if time.monotonic() > deadline:
                    waited = f"nothing listens at {host}:{port} after {self._timeout.seconds} s"
                    raise rdzv.RendezvousTimeoutError(f"{waited}: {error.strerror or error}") from None
            time.sleep(POLL_SECONDS)

    def _round_store(self, number: int) -> dist.PrefixStore:
        return dist.PrefixStore(f"round{number}", self._agents)

    def next_rendezvous(self) -> rdzv.RendezvousInfo:
        """Raises RendezvousError if a node gave up, stops or did not arrive in time, DistError if node 0 is gone."""
        deadline = time.monotonic() + self._timeout.total_seconds()
        while not self._all_confirm(store := self._arrive(), deadline):
            pass  # a node waits in the next round, so that this one cannot be completed
        host, port = parse_rendezvous_endpoint(store.get(WORKERS).decode(), default_port=-1)
        return rdzv.RendezvousInfo(store, self._node, self._nodes, rdzv.RendezvousStoreInfo(host, port))

    def _arrive(self) -> dist.PrefixStore:
        """Registers this node in the open round, and returns that round's store."""
        if self.is_closed():
            raise rdzv.RendezvousClosedError("another node has given up; see its own log")
        if self._no_restart_file.exists():
            raise rdzv.RendezvousClosedError("a worker has given up")
        if self.check_stopped():
            raise rdzv.RendezvousClosedError(STOPPING)
        self._round = self._agents.add(COMPLETE_ROUNDS, 0)
        store = self._round_store(self._round)
        # A node whose launcher died and was restarted may arrive twice.
        if store.add(f"{ARRIVED}/{self._node}", 1) == 1 and store.add(ARRIVED, 1) == self._nodes:
            self._agents.add(COMPLETE_ROUNDS, 1)
        if self._node == 0:
            self._workers = self._serve_store(0)
            store.set(WORKERS, f"{self._address}:{self._workers.port}")
        return store

    def _all_confirm(self, store: dist.PrefixStore, deadline: float) -> bool:
        """Waits until every node knows that all have arrived: one that arrived may have died since."""
        keys = [f"{CONFIRMED}/{node}" for node in range(self._nodes)]
        while not store.check(keys):
            if self.check_stopped():
                raise rdzv.RendezvousClosedError(STOPPING)
            if self._agents.add(COMPLETE_ROUNDS, 0) > self._round:
                store.set(keys[self._node], "")
            if self.num_nodes_waiting():
                return False
            if time.monotonic() > deadline:
                missing = self._nodes_without(store, ARRIVED) or self._nodes_without(store, CONFIRMED)
                raise rdzv.RendezvousTimeoutError(f"missing after {self._timeout.seconds} s: node {', '.join(missing)}")
            time.sleep(POLL_SECONDS)
        return True

    def _nodes_without(self, store: dist.PrefixStore, key: str) -> list[str]:
        return [str(node) for node in range(self._nodes) if not store.check([f"{key}/{node}"])]

    def num_nodes_waiting(self) -> int:
        """Nodes in the next round; a closed job counts as one, so that no node continues alone."""
        self.check_stopped()  # while node 0 can still tell
        return self._round_store(self._round + 1).add(ARRIVED, 0) or int(self.is_closed())

    def check_stopped(self) -> bool:
        """Updates and returns ``stopped``."""
        with contextlib.suppress(dist.DistError):  # node 0 is gone
            self.stopped = self.stopped or self._agents.check([STOPPED])
        return self.stopped

    def stop(self) -> None:
        """Tells all nodes that this one received a signal to stop."""
        self.stopped = True
        self._announce(STOPPED)

    def _announce(self, key: str) -> None:
        with contextlib.suppress(dist.DistError):  # node 0 is gone
            self._agents.set(key, "")

    def is_closed(self) -> bool:
        return self._agents.check([CLOSED])

    def set_closed(self) -> None:
        self._announce(CLOSED)

    def shutdown(self) -> bool:
        self._announce(CLOSED)
        return True

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self._run_id


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without waiting for the threads of torch's stores, which sometimes abort a process that is done
