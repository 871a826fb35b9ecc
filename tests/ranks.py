"""Run checks on several ranks: gloo processes on this machine, started once for a whole list of checks.

A check is a module-level function `check(world, ...)` that asserts; whatever a rank raises fails the test that
called `run`. Processes are forked from a server that has imported torch once, since that costs seconds.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace

import torch

import ring

ALONE = ring.World(0, 1, torch.device("cpu"))  # one process, no group


def one_rank(
    rank: int, ranks: int, port: int, checks: list[Callable], args: tuple, ended: multiprocessing.SimpleQueue
) -> None:
    torch.set_num_threads(1)
    here = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update(
        {name: str(n) for name, n in here.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
    world = ring.start("cpu")
    for check in checks:
        check(world, *args)
        ring.all_reduce_sum(torch.zeros(1), world)  # a barrier
    ring.stop()
    ended.put(rank)


def run(ranks: int, checks: list[Callable], *args) -> None:
    """Call each check(world, *args) on every one of `ranks` ranks; the first failure is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.set_forkserver_preload(["torch._dynamo", "ring", "longva"])
    ended = multiprocessing.get_context("forkserver").SimpleQueue()
    how = {"nprocs": ranks, "start_method": "forkserver"}
    torch.multiprocessing.start_processes(one_rank, (ranks, port, checks, args, ended), **how)
    for _ in range(ranks):  # what is checked may leave the process with exit code 0, as scripts do under torchrun
        assert not ended.empty(), "a rank ended before its last check"
        ended.get()


def unshard(local: torch.Tensor, world: ring.World, dim: int = 1) -> torch.Tensor:
    """Put zigzag shards back in order along `dim`, whole on every rank, no gradient. All ranks call it."""
    S = local.shape[dim] * world.ranks
    held_S = torch.cat([ring.zigzag_index(S, replace(world, rank=r)) for r in range(world.ranks)])
    return torch.cat(ring.all_gather(local, world), dim).index_select(dim, held_S.argsort().to(local.device))
