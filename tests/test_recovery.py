"""What goes wrong on a long run: ranks that are lost, full disks, losses that are no numbers, second jobs.

Each case says one sentence, and what was saved is not lost. Ranks are forked from a server that has imported torch;
their table lies in the test, as torchrun's lies in the launcher. A few cases go through torchrun itself.
"""

import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train_text
from data import flags, rollcall, runs, state

ROOT = Path(__file__).parents[1]
TINY = "--preset tiny-base --device cpu --seq-len 32 --batch 2 --short-steps 0".split()


# ---- ranks without torchrun ----


def one_rank(rank, ranks, port, said, argv, hook):
    """A rank as torchrun would start it; what it says goes to the file `said`."""
    here = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(n) for name, n in here.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    sys.argv = ["train_text.py"]
    with open(said, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    rollcall.POLL, rollcall.PATIENCE = 0.05, 0.2
    if hook:
        hook(rank)
    flags.run(train_text.main, train_text.Config, train_text.PRESETS, "tiny", [a.format(rank=rank) for a in argv])


class Job:
    """train_text.py on forked ranks; everything they say is in `said()`."""

    def __init__(self, out, *argv, ranks=2, hook=None):
        multiprocessing.set_forkserver_preload(["torch._dynamo", "ring", "longva", "train_text"])
        context = multiprocessing.get_context("forkserver")
        self.table = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.out, self.file = Path(out), Path(f"{out}.said".replace("{rank}", "N"))
        args = ranks, self.table.port, self.file, [*TINY, *map(str, argv), "--out", str(out)], hook
        self.ranks = [context.Process(target=one_rank, args=(rank, *args)) for rank in range(ranks)]
        for process in self.ranks:
            process.start()

    def codes(self, seconds=60):
        """Exit codes; all ranks must end in time."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
        assert None not in codes, f"still there: {codes}\n{self.said()}"
        return codes

    def said(self):
        return self.file.read_text(errors="replace").replace("\r", "\n")

    def complaints(self):
        return re.findall("train_text.py: (.*)", self.said())

    def steps(self):
        """How many steps the log holds."""
        log = self.out / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def reach(self, steps):
        """Wait until so many steps are logged, or the job has ended."""
        deadline = time.monotonic() + 60
        while self.steps() < steps and any(process.is_alive() for process in self.ranks):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "norm", "lr")} for line in lines]


def same_run(one, other):
    assert log_of(one) == log_of(other)
    mine, its = (load_file(folder / "model/model.safetensors") for folder in (one, other))
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)


# ---- random kills ----


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["--no-async-save", "--async-save"])
def test_ten_random_kills_change_nothing(tmp_path, how):
    """SIGKILL of one rank or both, anywhere in a step or a save; started again each time; every bit as undisturbed."""
    dice, flags = random.Random(len(how)), ["--steps", 60, "--save-every", 2]
    whole = Job(tmp_path / "whole", *flags, "--no-async-save")
    assert whole.codes() == [0, 0], whole.said()
    killed = 0
    for target in sorted(dice.sample(range(2, 56), 10)):
        job = Job(tmp_path / "killed", *flags, how)
        job.reach(target)
        time.sleep(dice.uniform(0, 0.05))
        victims = dice.choice([[0], [1], [0, 1]])
        for rank in victims:
            job.ranks[rank].kill()
        codes = job.codes(seconds=15)
        killed += all(codes[rank] == -signal.SIGKILL for rank in victims)
        assert all(code != 0 for code in codes), job.said()
    assert killed == 10
    last = Job(tmp_path / "killed", *flags, how)
    assert last.codes() == [0, 0], last.said()
    same_run(tmp_path / "whole", tmp_path / "killed")
    assert "Traceback" not in last.said(), last.said()


# ---- who was lost ----


def at_step(step, what, rank):
    """On rank 1, `what()` when the step begins."""
    share, calls = train_text.share, iter(range(1000))

    def sharing(*args):
        if rank == 1 and next(calls) == step:
            what()
        return share(*args)

    train_text.share = sharing


def fail():
    raise KeyError("the reason")


def refuse():
    raise OSError("the picture is torn")


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def be_patient(rank):
    import ring

    ring.TIMEOUT = ring.timedelta(seconds=3)
    at_step(5, freeze, rank)


LOST = "rank 1 lost: killed, frozen or cut off. Run the same command again: it goes on from step 4."


@pytest.mark.ranks
@pytest.mark.parametrize("hook, codes, complaints", [
    (partial(at_step, 5, partial(os._exit, 0)), [{1, 143}, {0}], [LOST]),
    (be_patient, [{1, 143}, {None}], [LOST]),
    (partial(at_step, 5, refuse), [{1, 143}, {2}], ["the picture is torn"]),
    (partial(at_step, 5, fail), [{1, 143}, {1}], []),
])  # fmt: skip
def test_one_sentence_by_one_rank(tmp_path, hook, codes, complaints):
    job = Job(tmp_path / "run", "--steps", 8, "--save-every", 2, hook=hook)
    job.ranks[0].join(60)
    if None in codes[1]:
        assert job.ranks[1].exitcode is None  # frozen; torchrun kills it
        job.ranks[1].kill()
        codes[1] = {-signal.SIGKILL}
    got = job.codes(seconds=10)
    assert all(code in allowed for code, allowed in zip(got, codes)), (got, job.said())
    assert job.complaints() == complaints, job.said()
    assert job.said().count("Traceback") == job.said().count("KeyError: 'the reason'") == ("fail" in str(hook))


@pytest.mark.ranks
def test_asked_to_stop(tmp_path):
    """SIGTERM, as before a preemption, to one rank: all end, and no one is called lost."""
    job = Job(tmp_path / "run", "--steps", 1000, "--save-every", 1000)
    job.reach(3)
    job.ranks[1].terminate()
    assert set(job.codes(seconds=15)) <= {1, 143}
    assert job.complaints() == ["stopped from outside. Run the same command again."], job.said()


# ---- torchrun ----


def torchrun(*how):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, how)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pid_of(rank, out):
    """The process id of a rank of the run in `out`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"--out\0{out}\0".encode() in (folder / "cmdline").read_bytes()
            if mine and f"\0RANK={rank}\0".encode() in (folder / "environ").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"no rank {rank}")


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_ends_within_seconds(tmp_path):
    out = tmp_path / "run"
    flags = [*TINY, "--steps", 5000, "--save-every", 2, "--out", out]
    job = torchrun("--standalone", "--nproc-per-node", 2, "train_text.py", *flags)
    deadline = time.monotonic() + 60
    while not (out / "state/step-4").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    os.kill(pid_of(1, out), signal.SIGKILL)
    began = time.monotonic()
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1 and time.monotonic() - began < 15
    sentence = (
        r"train_text.py: rank 1 lost: killed, frozen or cut off. Run the same command again: it goes on from step \d+"
    )
    assert len(re.findall(sentence, said)) == 1, said


@pytest.mark.ranks
def test_two_launchers_are_one_run(tmp_path):
    """A launcher per machine, here both on one: the losses of one launcher with two ranks, to the bit."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [*TINY, "--steps", 5]
    meet = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port, "--node-rank"]
    script = ["train_text.py", *flags, "--out", tmp_path / "two"]
    jobs = [torchrun(*meet, node, *script) for node in range(2)]
    one = Job(tmp_path / "one", "--steps", 5)
    assert one.codes() == [0, 0], one.said()
    for job in jobs:
        said, _ = job.communicate(timeout=60)
        assert job.returncode == 0, said
    same_run(tmp_path / "one", tmp_path / "two")


# ---- full disks, bad numbers, second jobs ----


def full(rank, module, name, after=0, room=20_000):
    """From the call number `after` of module.name on, no file that it writes may grow beyond `room` bytes."""
    module = importlib.import_module(module)
    function, calls = getattr(module, name), iter(range(10**6))

    def call(*args, **how):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if next(calls) >= after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            return function(*args, **how)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    setattr(module, name, call)


@pytest.mark.ranks
@pytest.mark.parametrize("how, hook, left", [
    ("--no-async-save", partial(full, module="data.state", name="write_part", after=1), 1),
    ("--async-save", partial(full, module="data.state", name="write_part", after=1), 1),
    ("--no-async-save", partial(full, module="data.runs", name="log", room=600), 2),
    ("--async-save", partial(full, module="train_text", name="export"), 8),
])  # fmt: skip
def test_a_full_disk(tmp_path, how, hook, left):
    """One sentence, and the last state is there; with room again, the run ends as if nothing had been."""
    flags = ["--steps", 8, "--save-every", 1, how]
    job = Job(tmp_path / "run", *flags, hook=hook)
    assert 2 in job.codes()
    assert "Traceback" not in job.said() and "too large" in job.said(), job.said()
    assert 1 <= len(job.complaints()) <= 2, job.said()  # no launcher ends the rank that meets it second
    assert all("Make room. Run the same command again: it goes on from" in line for line in job.complaints()), (
        job.said()
    )
    assert max(state.saved_steps(tmp_path / "run/state")) >= left
    again = Job(tmp_path / "run", *flags)
    assert set(again.codes()) == {0}, again.said()
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(8))


@pytest.mark.ranks
def test_a_loss_that_is_no_number(tmp_path):
    job = Job(tmp_path / "run", "--steps", 9, "--lr", 1e30, "--accumulate", 2, "--save-every", 1)
    assert set(job.codes()) <= {2, 143}
    found = re.fullmatch(
        r"step (\d+), part 0 of 2: the loss is nan; stopped before it reached the parameters", job.complaints()[0]
    )
    assert found and set(job.complaints()) == {found[0]} and "Traceback" not in job.said(), job.said()
    assert max(state.saved_steps(tmp_path / "run/state")) == int(found[1]) > 0


@pytest.mark.ranks
def test_folders_that_ranks_do_not_share(tmp_path):
    """Found at the start, not by the first save."""
    job = Job(tmp_path / "run-{rank}", "--steps", 2)
    assert set(job.codes()) <= {2, 143}
    assert "all machines must share this folder" in job.complaints()[0] and not job.steps(), job.said()


def test_a_second_job_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    runs.hold(tmp_path / "run")
    job = Job(tmp_path / "run", "--steps", 2, ranks=1)
    assert job.codes() == [2]
    assert job.complaints() == [f"another run writes to {tmp_path / 'run'}; let it end, or choose another --out"]
    runs.HELD.pop((tmp_path / "run").resolve()).close()
    again = Job(tmp_path / "run", "--steps", 2, ranks=1)
    assert again.codes() == [0], again.said()
