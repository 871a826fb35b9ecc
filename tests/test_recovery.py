"""What goes wrong on a long run: ranks that are lost, full disks, losses that are no numbers, second jobs.

Each case says one sentence, and what was saved is not lost. Most ranks are forked; a few cases go through torchrun.
"""

import builtins
import errno
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_text
import train_vision
import vniah
from data import checkpoint, flags, llava, pack, results, runs, synthetic, weights
from tests.ranks import Job, forkserver, wait_for

ROOT = Path(__file__).parents[1]
TINY = "--preset tiny-base --device cpu --seq-len 32 --batch 2 --curriculum-steps 0".split()


def training(out, *argv, **how):
    """train_text.py on two ranks."""
    return Job("train_text.py", out, *TINY, *argv, **how)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "norm", "lr")} for line in lines]


def same_run(one, other):
    assert log_of(one) == log_of(other)
    mine, its = (load_file(folder / "model/model.safetensors") for folder in (one, other))
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)


# ---- random kills --------------------------------------------------------------------------------


@pytest.mark.ranks
def test_ten_random_kills_change_nothing(tmp_path):
    """SIGKILL of one rank or both, anywhere in a step or a save; started again each time; every bit as undisturbed."""
    dice, flags = random.Random(0), ["--steps", 44, "--save-every", 2]
    whole = training(tmp_path / "whole", *flags)
    assert whole.codes() == [0, 0], whole.said()
    killed = 0
    for target in (4 * n + dice.randrange(2) for n in range(1, 11)):
        job = training(tmp_path / "killed", *flags)
        job.wait_for(lambda target=target, job=job: job.steps() >= target)
        time.sleep(dice.uniform(0, 0.05))
        victims = dice.choice([[0], [1], [0, 1]])
        for rank in victims:
            job.ranks[rank].kill()
        codes = job.codes(seconds=15)
        killed += all(codes[rank] == -signal.SIGKILL for rank in victims)
        assert all(code != 0 for code in codes), job.said()
    assert killed == 10
    last = training(tmp_path / "killed", *flags)
    assert last.codes() == [0, 0], last.said()
    same_run(tmp_path / "whole", tmp_path / "killed")
    assert "Traceback" not in last.said(), last.said()


# ---- every file operation ------------------------------------------------------------------------


class Shim:
    """Count this process's changes of files in `folder`; the one numbered `at` kills it, or fails as on a full disk."""

    def __init__(self, folder, at, how):
        self.folder, self.at, self.how, self.done = str(folder), at, how, {"kill": 0, "full": 0}
        self.open = io.open
        builtins.open = io.open = self.opened
        wrapped = [(os, name) for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")]
        wrapped += [(module, "save_file") for module in (checkpoint, weights)]
        for module, name in wrapped:
            setattr(module, name, partial(self.call, getattr(module, name)))

    def count(self, what, before=lambda: None):
        self.done["kill"] += 1
        self.done["full"] += what not in ("unlink", "rmdir")  # a full disk lets files go
        counted = self.how == "kill" or what not in ("unlink", "rmdir")
        if counted and self.done[self.how] == self.at:
            before()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device", f"{self.folder}/...")

    def call(self, function, *args, **how):
        ours = [one for one in args if self.folder in str(one)] or "dir_fd" in how or function.__name__ == "fsync"
        if ours and not (function.__name__ == "mkdir" and os.path.isdir(args[0])):  # which changes nothing
            self.count(function.__name__)
        return function(*args, **how)

    def opened(self, path, mode="r", *args, **how):
        writes = set(mode) & set("wax+") and (self.folder in str(path) or isinstance(path, int))
        if writes:
            self.count("open")
        file = self.open(path, mode, *args, **how)
        if writes:
            file.write = partial(self.write, file, file.write)
        return file

    def write(self, file, write, data):
        """Count a write; the one that is to go wrong leaves half of its data."""
        self.count("write", lambda: (write(data[: len(data) // 2]), file.flush()))
        return write(data)


PAIRS = "--stage dpo --device cpu --batch 2 --steps 2 --save-every 1 --frames 2 --weights data/tiny/longva"
GRID = "--device cpu --frames 2 4 --depths 0 1 --needle-count 2 --max-new-tokens 1 --weights data/tiny/longva"
TOYS = {  # name: script, preset, flags
    "train_text": (train_text, "tiny", [*TINY, "--steps", "4", "--save-every", "2"]),
    "train_vision": (train_vision, "tiny", PAIRS.split()),
    "vniah": (vniah, "tiny", GRID.split()),
    "pack": (pack, None, "DOCS --tokenizer data/tiny/tokenizer --keep-short 1".split()),
}


def one_attempt(toy, out, at, how, said):
    """Run a toy in this process, which is lost afterwards; pictures take longer than all else."""
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    runs.draw_curve = lambda folder: runs.replace_text(folder / "curve.png", "a curve")
    results.draw_heatmaps = results.draw_comparison = lambda file, *a: runs.replace_text(file, "a picture")
    train_vision.print_held_out_score, llava.SYNTHETIC_PAIRS, pack.SAVE_EVERY = lambda *a: None, 4, 3
    module, preset, words = TOYS[toy]
    words = [word.replace("DOCS", str(out.parent.parent / "docs")) for word in words]
    sys.argv = ["toy.py"]
    shim = Shim(out, at, how)
    try:
        presets = getattr(module, "PRESETS", {})
        flags.run(module.main, module.Config, presets, preset, [*words, "--out", str(out)])
    finally:
        said.with_suffix(".count").write_text(json.dumps(shim.done))


def attempt(toy, out, at=0, how="kill"):
    """Run a toy in a process of its own. Returns (exit code, what it said)."""
    said = out.parent / "said"
    process = forkserver().Process(target=one_attempt, args=(toy, out, at, how, said))
    process.start()
    process.join(120)
    return process.exitcode, said.read_text()


def left_by(out):
    """{file: what it holds} of a run, without times and its own name."""
    found = {}
    for file in out.rglob("*"):
        if file.is_file() and file.name != ".lock":
            content = file.read_bytes()
            if file.suffix in (".json", ".jsonl", ".html"):
                content = re.sub(rb'"(seconds|\w+_per_s|gb|tflop_per_s_and_rank)": [0-9.e+-]+', b"", content)
            found[str(file.relative_to(out))] = content.replace(str(out).encode(), b"OUT")
    return found


@pytest.fixture(scope="module", params=TOYS)
def toy(request, tmp_path_factory):
    """(name of a toy, folder, what an undisturbed run leaves, how many file operations it makes)."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "docs").mkdir()
    for i in range(8):
        (folder / "docs" / f"{i}.txt").write_text(synthetic.story(i, 20))
    out = folder / "whole" / "run"
    out.parent.mkdir()
    code, said = attempt(request.param, out)
    assert code == 0, said
    return request.param, folder, left_by(out), json.loads((folder / "whole/said.count").read_text())


def try_cells(toy, how, cells):
    name, folder, whole, _ = toy
    for at in cells:
        (folder / f"{how}-{at}").mkdir()
        out = folder / f"{how}-{at}" / "run"
        code, said = attempt(name, out, at, how)
        if how == "kill":
            assert code == -signal.SIGKILL, (at, code, said)
        else:
            assert code == 2 and "Traceback" not in said, (at, said)
            assert str(out) in said and "No space left on device" in said and "free disk space" in said, (at, said)
        code, said = attempt(name, out)
        assert code == 0, (at, said)
        now = left_by(out)
        assert now.keys() == whole.keys(), (at, now.keys() ^ whole.keys())
        assert now == whole, (at, [file for file in now if now[file] != whole[file]])
        shutil.rmtree(folder / f"{how}-{at}")


@pytest.mark.parametrize("how", ["kill", "full"])
def test_a_fault_at_a_file_operation_changes_nothing(toy, how):
    """Killed, or the disk full, at one drawn for each toy: the next run ends as an undisturbed one."""
    try_cells(toy, how, random.Random(f"{toy[0]} {how}").sample(range(1, toy[3][how] + 1), 1))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "full"])
def test_a_fault_at_every_file_operation_changes_nothing(toy, how):
    try_cells(toy, how, range(1, toy[3][how] + 1))
    print(f"{toy[0]}, {how}: {toy[3][how]} cells")


# ---- torchrun ------------------------------------------------------------------------------------


TWO = "--standalone --nproc-per-node 2".split()
TEN_STEPS = "--steps 10 --save-every 2".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    job = training(out, *TEN_STEPS)
    assert job.codes() == [0, 0], job.said()
    return out


def torchrun(*how, stdout=subprocess.PIPE):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, how)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.STDOUT, text=True)


def wait_for_file(file, job):
    wait_for(lambda: file.exists() or job.poll() is not None)
    assert job.poll() is None, job.communicate()[0]


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
def test_torchrun_starts_a_killed_run_again(tmp_path, whole):
    """With --max-restarts a rank is killed twice, and the run ends by itself as if nothing had been, to the bit."""
    out = tmp_path / "killed"
    flags = [*TINY, *TEN_STEPS, "--out", out]
    job = torchrun(*TWO, "--max-restarts", 3, "--monitor-interval", 0.1, "train_text.py", *flags)
    for step, rank in ((4, 1), (8, 0)):
        wait_for_file(out / f"state/step-{step}", job)
        os.kill(pid_of(rank, out), signal.SIGKILL)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    same_run(whole, out)


@pytest.mark.ranks
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_ends_within_seconds(tmp_path):
    """Without restarts: a lost rank is named by torchrun, and how to go on by the others."""
    out = tmp_path / "run"
    job = torchrun(*TWO, "train_text.py", *TINY, "--steps", 5000, "--save-every", 2, "--out", out)
    wait_for_file(out / "state/step-4", job)
    os.kill(pid_of(1, out), signal.SIGKILL)
    began = time.monotonic()
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1 and time.monotonic() - began < 15
    assert "rank 0: another rank is lost; run the same command again: it continues from the saved state" in said, said
    assert re.search(r"rank\s*: 1 ", said), said
    assert "Traceback" not in said.split("ChildFailedError")[0].split("torch/")[0], said


@pytest.mark.ranks
def test_two_launchers_are_one_run(tmp_path, whole):
    """A launcher per machine, here both on one: the losses of one launcher with two ranks, to the bit."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    meet = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port, "--node-rank"]
    command = ["train_text.py", *TINY, *TEN_STEPS, "--out", tmp_path / "two"]
    jobs = [torchrun(*meet, node, *command) for node in range(2)]
    for job in jobs:
        said, _ = job.communicate(timeout=60)
        assert job.returncode == 0, said
    same_run(whole, tmp_path / "two")


# ---- full disks, bad numbers, second jobs --------------------------------------------------------


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
@pytest.mark.parametrize("hook, left", [
    (partial(full, module="data.checkpoint", name="write_part", after=1), 1),
    (partial(full, module="data.runs", name="log", room=600), 2),
    (partial(full, module="data.weights", name="save"), 4),
])  # fmt: skip
def test_a_full_disk(tmp_path, hook, left):
    """One sentence, and the last state is there; with room again, the run ends as if nothing had been."""
    flags = ["--steps", 4, "--save-every", 1]
    job = training(tmp_path / "run", *flags, hook=hook)
    assert 2 in job.codes()
    assert "Traceback" not in job.said() and "too large" in job.said(), job.said()
    assert 1 <= len(job.complaints()) <= 2, job.said()  # no launcher ends the rank that meets it second
    assert all("; free disk space, then run the same command again" in line for line in job.complaints()), job.said()
    assert max(checkpoint.saved_steps(tmp_path / "run/state")) >= left
    again = training(tmp_path / "run", *flags)
    assert set(again.codes()) == {0}, again.said()
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(4))


def huge_rate(rank):
    train_text.learning_rate = lambda *a: 1e30


@pytest.mark.ranks
def test_a_loss_that_is_no_number(tmp_path):
    job = training(tmp_path / "run", "--steps", 9, "--grad-accumulation", 2, "--save-every", 1, hook=huge_rate)
    assert set(job.codes()) <= {2, 143}
    sentence = r"step (\d+), micro-batch 0 of 2: the loss is nan; stopped before it reached the parameters"
    found = re.fullmatch(sentence, job.complaints()[0])
    assert found and set(job.complaints()) == {found[0]} and "Traceback" not in job.said(), job.said()
    assert max(checkpoint.saved_steps(tmp_path / "run/state")) == int(found[1]) > 0


@pytest.mark.ranks
def test_folders_that_ranks_do_not_share(tmp_path):
    """Found at the start, not by the first save."""
    job = training(tmp_path / "run-{rank}", "--steps", 2)
    assert set(job.codes()) <= {2, 143}
    assert "all machines must share this folder" in job.complaints()[0] and not job.steps(), job.said()


def test_a_second_job_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    runs.lock(tmp_path / "run")
    job = training(tmp_path / "run", "--steps", 2, ranks=1)
    assert job.codes() == [2]
    assert job.complaints() == [f"another run writes to {tmp_path / 'run'}; let it end, or choose another --out"]
    runs.LOCKS.pop((tmp_path / "run").resolve()).close()
    again = training(tmp_path / "run", "--steps", 2, ranks=1)
    assert again.codes() == [0], again.said()


def test_ranks_die_with_their_launcher(tmp_path):
    """A torchrun that is killed with SIGKILL leaves no rank behind that would go on writing."""
    log = tmp_path / "run/log.jsonl"
    flags = [*TINY, "--steps", 100_000, "--out", tmp_path / "run"]
    one = ["--standalone", "--nproc-per-node", 1]  # each rank asks the system for it by itself
    launcher = torchrun(*one, "train_text.py", *flags, stdout=subprocess.DEVNULL)  # a full pipe would stop it, too
    wait_for_file(log, launcher)
    launcher.kill()
    launcher.wait()
    time.sleep(1)
    written = log.read_bytes()
    time.sleep(1)
    assert log.read_bytes() == written
