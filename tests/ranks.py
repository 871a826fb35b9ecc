"""Run checks, or a training script, on several ranks: gloo processes on this machine.

A check is a module-level function `check(world, ...)` that asserts; whatever a rank raises fails the test that
called `run`, which starts the ranks once for a whole list of checks. `Job` is a script on ranks, as torchrun starts it.
Processes are forked from a server that has imported torch and the scripts once, since that costs seconds.
"""

import importlib
import multiprocessing
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import ring
from data import flags

ALONE = ring.World(0, 1, torch.device("cpu"))  # one process, no group


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Processes are forked from one server, which has imported torch and the scripts."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", "train_text", "train_vision", "vniah", "data.pack"])
    return multiprocessing.get_context("forkserver")


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
    ended = forkserver().SimpleQueue()
    how = {"nprocs": ranks, "start_method": "forkserver"}
    torch.multiprocessing.start_processes(one_rank, (ranks, port, checks, args, ended), **how)
    for _ in range(ranks):  # what is checked may leave the process with exit code 0, as scripts do under torchrun
        assert not ended.empty(), "a rank ended before its last check"
        ended.get()


def one_rank_of_a_script(
    rank: int, ranks: int, port: int, said: Path, script: str, argv: list[str], hook: Callable | None
) -> None:
    """A rank as torchrun would start it; what it says goes to the file `said`."""
    here = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(n) for name, n in here.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    sys.argv = [script]
    with open(said, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if hook:
        hook(rank)
    module = importlib.import_module(script.removesuffix(".py"))
    flags.run(module.main, module.Config, module.PRESETS, "tiny", [word.format(rank=rank) for word in argv])


class Job:
    """A training script on ranks; everything they say is in `said()`. The test holds their store, as torchrun does."""

    def __init__(self, script: str, out: Path, *argv: object, ranks: int = 2, hook: Callable | None = None):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.script, self.out, self.file = script, Path(out), Path(f"{out}.said".replace("{rank}", "N"))
        args = ranks, self.store.port, self.file, script, [*map(str, argv), "--out", str(out)], hook
        self.ranks = [forkserver().Process(target=one_rank_of_a_script, args=(rank, *args)) for rank in range(ranks)]
        for process in self.ranks:
            process.start()

    def codes(self, seconds: float = 60) -> list[int]:
        """Exit codes; all ranks must end in time."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
        assert None not in codes, f"still there: {codes}\n{self.said()}"
        return codes

    def end(self) -> str:
        """Wait until all ranks have ended well; what they said."""
        assert set(self.codes(200)) == {0}, self.said()
        return self.said()

    def said(self) -> str:
        return self.file.read_text(errors="replace").replace("\r", "\n")

    def complaints(self) -> list[str]:
        return re.findall(f"{self.script}: (.*)", self.said())

    def steps(self) -> int:
        """How many steps the log holds."""
        log = self.out / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Wait until something has happened, or all ranks have ended."""
        wait_for(lambda: happened() or not any(process.is_alive() for process in self.ranks))


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def unshard(local: torch.Tensor, world: ring.World, dim: int = 1) -> torch.Tensor:
    """Put zigzag shards back in order along `dim`, whole on every rank, no gradient. All ranks call it."""
    S = local.shape[dim] * world.ranks
    held_S = torch.cat([ring.zigzag_index(S, replace(world, rank=r)) for r in range(world.ranks)])
    return torch.cat(ring.all_gather(local, world), dim).index_select(dim, held_S.argsort().to(local.device))
