"""torchrun on one network interface: all that listens is bound to it, and nothing that comes over it is unpickled.

python -m nemo_speculative.launch --nproc-per-node 8 recipes/train_eagle3.py model=llama31_8b data=jsonl data.path=FILE
python -m nemo_speculative.launch --nnodes 2 --node-rank 0 --master-addr node0 --interface eth0 --nproc-per-node 8 \
    recipes/train_eagle3.py model=llama31_8b data=jsonl data.path=FILE

Options are torchrun's and two more: ``--interface``, which is the loopback where there is one node, and
``--stopped-status``.  torchrun itself listens on every interface, and its c10d rendezvous unpickles what anybody who
can connect writes there.  SIGTERM goes to the workers; none is started again after it, nor after an error that would
come again.
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
from typing import NoReturn, cast

import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from nemo_speculative.utils.errors import NO_RESTART_FILE, PeerLostError, UsageError, UserError, print_error
from nemo_speculative.utils.network import FRESH_STORE, LOOPBACK, bind_collectives_to, bind_socket, ipv4_address

BACKEND = "one-interface"
PORT = 29500
"""torchrun's own."""
FULL, CLOSED, STOPPED = "full", "closed", "stopped"
"""Keys: how many rounds are complete, that there will be no more, and that a node was asked to stop."""
NODES, STAYS, WORKERS = "nodes", "stays", "workers"
"""Keys of a round: who has come to it, who stays, and where the workers' store is."""
LOOK_SECONDS = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the processes of this node and waits for them; the exit status."""
    try:
        args = _parser().parse_args(arguments)
        settle(args)
        with tempfile.TemporaryDirectory(prefix="nemo_speculative_") as folder:
            return Launcher(args, Path(folder) / "hopeless").run()
    except UserError as error:
        print_error(error)
        return error.exit_code


class Launcher:
    """torchrun's agent on this node.

    Args:
        hopeless: where its workers are to say that to start them again would not help; not there yet.
    """

    def __init__(self, args: argparse.Namespace, hopeless: Path):
        self._args, self._hopeless = args, hopeless
        self._nodes: FixedNodes | None = None
        self._asked_to_stop = False

    def run(self) -> int:
        """Until the workers have ended; the exit status.

        Raises:
            LostError: the nodes did not find each other, or one of them is gone.
            UserError: a worker failed.
        """
        bind_collectives_to(self._args.interface)
        os.environ.update({FRESH_STORE: "1", NO_RESTART_FILE: str(self._hopeless)})
        rendezvous_handler_registry.register(BACKEND, self._meet)
        status = 0
        try:
            torchrun.run(self._args)
        except SignalException as error:
            status = 128 + error.sigval
            if error.sigval != signal.SIGTERM:
                return status
        except (ChildFailedError, RendezvousError, dist.DistError) as error:
            if not (self._nodes and self._nodes.hears_stop()):
                raise self._failure(error) from None
            # Outside its steps a run has nothing to save: what asks it to stop kills it.
            status = 128 + signal.SIGTERM
        given = self._args.stopped_status
        stopped = self._asked_to_stop or (self._nodes and self._nodes.stopped)
        return given if given is not None and stopped else status

    def _failure(self, error: Exception) -> UserError:
        """What a user is told of how torch's agent ended."""
        if isinstance(error, ChildFailedError):
            rank, failure = error.get_first_failure()
            how = f"killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"
            return UserError(f"rank {rank} was the first to fail ({how}); what it said is above")
        if self._hopeless.exists():
            hopeless = self._hopeless.read_text().split()[0]
            return UserError(f"rank {hopeless} failed, and to start again would not help; what it said is above")
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return PeerLostError(
            f"the {self._args.nnodes} node(s) did not meet, or one of them is gone ({first}); start this on "
            "every node with its own --node-rank and the same --nnodes, --master-addr and --master-port"
        )

    def _meet(self, parameters: RendezvousParameters) -> RendezvousHandler:
        signal.signal(signal.SIGTERM, self._stop)
        self._nodes = FixedNodes(parameters, self._hopeless)
        return self._nodes

    def _stop(self, number: int, _: object) -> None:
        """Passes a signal on to the workers; where there are none there is nothing to save."""
        self._asked_to_stop = True
        if self._nodes:
            self._nodes.stop()
        children = _children()
        if not children:
            raise SignalException("no workers to pass it on to", sigval=signal.Signals(number))
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


def _parser() -> argparse.ArgumentParser:
    parser = torchrun.get_args_parser()
    parser.prog = "python -m nemo_speculative.launch"
    parser.description = "torchrun, with everything that listens bound to one network interface"
    parser.add_argument("--interface", help="network interface; the loopback where there is one node")
    parser.add_argument(
        "--stopped-status", type=int, metavar="STATUS",
        help="exit status on every node after SIGTERM to one of them; unless given 0 if the workers end well, else 143",
    )  # fmt: skip
    return parser


def settle(args: argparse.Namespace) -> None:
    """Sets what of torchrun's arguments this launcher decides.

    Raises:
        UserError: what was given cannot be had.
    """
    args.nnodes = _one_number(args.nnodes)
    try:
        torchrun.determine_local_world_size(args.nproc_per_node)
    except ValueError as error:
        raise UsageError(f"--nproc-per-node is {args.nproc_per_node}: {error}") from None
    if args.rdzv_backend != "static" or args.rdzv_endpoint:
        raise UsageError(
            f"--rdzv-backend {args.rdzv_backend} --rdzv-endpoint {args.rdzv_endpoint}: not of this launcher, where the "
            "nodes meet at --master-addr and --master-port; leave them out"
        )
    alone = args.standalone or args.nnodes == "1"
    if not args.standalone and not 0 <= args.node_rank < int(args.nnodes):
        last = int(args.nnodes) - 1
        raise UsageError(f"--node-rank is {args.node_rank}: expected 0 to {last}, because --nnodes is {args.nnodes}")
    if not alone and not args.interface:
        raise UsageError("--interface is not given: with several nodes name the network they share, e.g. eth0")
    if alone:
        args.nnodes, args.node_rank = "1", 0
    args.interface = args.interface or LOOPBACK
    args.local_addr = ipv4_address(args.interface, "--interface")
    host, port = (args.local_addr, args.master_port or 0) if alone else (args.master_addr, args.master_port or PORT)
    if args.node_rank == 0:
        _check_master(host, args)
    args.rdzv_backend, args.rdzv_endpoint = BACKEND, f"{host}:{port}"
    args.rdzv_conf = ",".join(filter(None, (args.rdzv_conf, f"rank={args.node_rank}")))
    # A run that is asked to stop saves first: this launcher passes the signal on, and its agent does not hurry them.
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    args.standalone, args.node_rank = False, 0


def _one_number(nodes: str) -> str:
    fewest, _, most = nodes.partition(":")
    if not fewest.isdecimal() or int(fewest) < 1 or (most or fewest) != fewest:
        raise UsageError(f"--nnodes is {nodes}: expected one number, above 0; the nodes of a job are fixed")
    return fewest


def _check_master(host: str, args: argparse.Namespace) -> None:
    """What the other nodes will connect to is where this one listens, as far as it can tell."""
    with contextlib.suppress(OSError):  # a name that only the others know
        found = socket.gethostbyname(host)
        if found != args.local_addr and not found.startswith("127."):
            raise UsageError(
                f"--master-addr {host} is {found}, but --interface {args.interface} of this node 0 has "
                f"{args.local_addr}; give that as --master-addr to all nodes"
            )


def _children() -> list[int]:
    """Processes of this one, which are the workers."""
    return [
        int(child) for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
    ]


class FixedNodes(RendezvousHandler):
    """Where the agents of a job's nodes meet, and meet again when the workers of one of them have failed.

    Node 0 has a store for the agents, and for the workers of each round one of their own, in which nothing is left of
    those before.  A round is complete when every node has come; one that waits in the next makes the others leave.

    Args:
        parameters: endpoint, where node 0 listens; local_addr, this node's address; rank, this node's number; timeout,
            the seconds in which all have to come.
        hopeless: where a worker says that to start again would not help; then this node comes no more.
    """

    def __init__(self, parameters: RendezvousParameters, hopeless: Path):
        self._parameters, self._hopeless, self._round = parameters, hopeless, 0
        self._node, self._nodes = cast(int, parameters.get_as_int("rank")), parameters.max_nodes
        self._timeout = timedelta(seconds=cast(int, parameters.get_as_int("timeout")))
        host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=PORT)
        store = self._serve(port) if self._node == 0 else self._find(host, port)
        self._agents = dist.PrefixStore(self.get_run_id(), store)
        self._workers: dist.TCPStore | None = None
        self.stopped = False
        """Whether a node was asked to stop, as far as this one has heard."""

    def _serve(self, port: int) -> dist.TCPStore:
        """A store that listens on this node's own address; torch's alone would listen on all."""
        address = cast(str, self._parameters.local_addr)
        with bind_socket(address, port, f"--master-port {port} of {address}") as listener:
            listener.listen()
            taken = listener.getsockname()[1]
            return dist.TCPStore(
                address, taken, is_master=True, timeout=self._timeout, wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )  # fmt: skip

    def _find(self, host: str, port: int) -> dist.TCPStore:
        """Node 0's store.  What torch prints while it waits for one is waited for before."""
        deadline = time.monotonic() + self._timeout.total_seconds()
        while True:
            try:
                with socket.create_connection((host, port), max(deadline - time.monotonic(), LOOK_SECONDS)):
                    return dist.TCPStore(host, port, timeout=self._timeout)
            except OSError as error:
                if time.monotonic() > deadline:
                    said = f"nobody listens at {host}:{port} after {self._timeout.seconds} s: {error.strerror or error}"
                    raise RendezvousTimeoutError(said) from None
            time.sleep(LOOK_SECONDS)

    def _of_round(self, number: int) -> dist.PrefixStore:
        return dist.PrefixStore(f"round{number}", self._agents)

    def next_rendezvous(self) -> RendezvousInfo:
        """
        Raises:
            RendezvousError: a node or worker has given up, a node was asked to stop, or not all have come in time.
            torch.distributed.DistError: node 0 is gone.
        """
        deadline = time.monotonic() + self._timeout.total_seconds()
        while not self._all_stay(here := self._come(), deadline):
            pass  # somebody waits in the next round, so that this one can only be left
        host, port = parse_rendezvous_endpoint(here.get(WORKERS).decode(), default_port=-1)
        return RendezvousInfo(here, self._node, self._nodes, RendezvousStoreInfo(host, port))

    def _come(self) -> dist.PrefixStore:
        """Says in the store of the open round that this node is there."""
        if self.is_closed():
            raise RendezvousClosedError("another node has given up; what it said is in its own log")
        if self._hopeless.exists():
            raise RendezvousClosedError("a worker has given up")
        self._check_not_stopped()
        self._round = self._agents.add(FULL, 0)
        here = self._of_round(self._round)
        # A node whose launcher died and was started again may come twice.
        if here.add(f"{NODES}/{self._node}", 1) == 1 and here.add(NODES, 1) == self._nodes:
            self._agents.add(FULL, 1)
        if self._node == 0:
            self._workers = self._serve(0)
            here.set(WORKERS, f"{self._parameters.local_addr}:{self._workers.port}")
        return here

    def _all_stay(self, here: dist.PrefixStore, deadline: float) -> bool:
        """Waits until every node has come and knows that all have: one that came may have died since."""
        stay = [f"{STAYS}/{node}" for node in range(self._nodes)]
        while not here.check(stay):
            self._check_not_stopped()
            if self._agents.add(FULL, 0) > self._round:
                here.set(stay[self._node], "")
            if self.num_nodes_waiting():
                return False
            if time.monotonic() > deadline:
                absent = self._without(here, NODES) or self._without(here, STAYS)
                raise RendezvousTimeoutError(f"not there after {self._timeout.seconds} s: node {', '.join(absent)}")
            time.sleep(LOOK_SECONDS)
        return True

    def _check_not_stopped(self) -> None:
        if self.hears_stop():
            raise RendezvousClosedError("a node was asked to stop")

    def _without(self, here: dist.PrefixStore, key: str) -> list[str]:
        return [str(node) for node in range(self._nodes) if not here.check([f"{key}/{node}"])]

    def num_nodes_waiting(self) -> int:
        """Of the next round; a job that is over counts as one, so that nobody goes on alone."""
        self.hears_stop()  # while node 0 is there to say so
        return self._of_round(self._round + 1).add(NODES, 0) or int(self.is_closed())

    def hears_stop(self) -> bool:
        """Asks for ``stopped``."""
        with contextlib.suppress(dist.DistError):  # node 0 has gone before
            self.stopped = self.stopped or self._agents.check([STOPPED])
        return self.stopped

    def stop(self) -> None:
        """Tells all nodes that this one was asked to stop."""
        self.stopped = True
        with contextlib.suppress(dist.DistError):  # node 0 has gone before
            self._agents.set(STOPPED, "")

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Workers connect to the store that this node's agent named, and none listens itself."""
        return True

    def get_run_id(self) -> str:
        return self._parameters.run_id

    def is_closed(self) -> bool:
        return self._agents.check([CLOSED])

    def set_closed(self) -> None:
        with contextlib.suppress(dist.DistError):  # node 0 has gone before
            self._agents.set(CLOSED, "")

    def shutdown(self) -> bool:
        self.set_closed()
        return True


def _end(status: int) -> NoReturn:
    """Without waiting for the threads of torch's stores, which now and then abort a process that is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _end(main())
