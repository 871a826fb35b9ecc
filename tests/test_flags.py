import dataclasses
import importlib
import io
import os
import subprocess
import sys
import time
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from data import flags
from data.flags import parse, setting
from data.video import read_picture

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Config:
    """Toy."""

    mode: Literal["vision", "text"] = setting("vision", "which test", positional=True)
    question: str = setting("what?", "what to ask", positional=True)
    model: Path = setting(Path("m"), "folder")
    steps: int = setting(1000, "steps (Sec. 3.1), 100 % of them")
    lr: float = setting(1e-5, "lr")
    offload: bool = setting(True, "offload")
    scheme: Literal["unires", "anyres"] = setting("unires", "scheme")
    size: Literal[2, 4] = setting(2, "size")
    resume: Path | None = setting(None, "resume")
    frames: tuple[int, ...] = setting((8, 16), "frames")
    depths: tuple[float, ...] | None = setting(None, "depths")
    betas: tuple[float, float] = setting((0.9, 0.95), "betas")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}: expected at least 1")


def toy(*settings):
    """A dataclass of settings (name, type, setting(...))."""
    return dataclasses.make_dataclass("Toy", settings, frozen=True)


PRE = {"tiny": {"steps": 3, "offload": False, "frames": (1,)}, "paper": {}}
SMALL = Config(**PRE["tiny"])


def read(*argv, **how):
    return parse(Config, PRE, argv=list(argv), **how)


@pytest.fixture
def ends(capsys, monkeypatch):
    """Call something that ends the process with an exit code; returns what train.py has printed, errors or help."""
    monkeypatch.setattr(sys, "argv", ["here/train.py"])

    def ends(code, call, *args, **how):
        with pytest.raises(SystemExit) as stop:
            call(*args, **how)
        said = capsys.readouterr()
        assert stop.value.code == code and not (said.err if code == 0 else said.out)
        assert said.err.count("\n") == bool(said.err) and len(said.err) < 400  # one short line
        return said.out if code == 0 else said.err

    return ends


@pytest.mark.parametrize("argv, want", [
    ("", Config()),
    ("--preset tiny", SMALL),
    ("--preset tiny --steps 224_000", replace(SMALL, steps=224000)),  # a flag beats the preset, wherever it stands
    ("--frames 5 --preset tiny --offload", replace(SMALL, frames=(5,), offload=True)),
    ("--no-offload --resume x --size 4 --frames 8 4", Config(offload=False, resume=Path("x"), size=4, frames=(8, 4))),
    ("--lr 2e-6 --depths -1 .5 --betas .9 .98", Config(lr=2e-6, depths=(-1.0, 0.5), betas=(0.9, 0.98))),
    ("text why? --lr 1", Config("text", "why?", lr=1)),
    ("--lr 1 text why?", Config("text", "why?", lr=1)),
    ("text", Config("text")),
    ("text -- --why?", Config("text", "--why?")),
])  # fmt: skip
def test_flags_are_read(argv, want):
    assert read(*argv.split()) == want


def test_default_preset_and_the_real_command_line(monkeypatch):
    assert read(default="tiny") == SMALL and read("--lr", "1", default="tiny").steps == 3
    assert read("--preset", "paper", default="tiny").steps == 1000
    assert read("text", "--really, why?") == Config("text", "--really, why?")
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "7"])
    assert parse(Config, PRE) == Config(steps=7)
    seen = []
    flags.run(seen.append, Config, PRE, default="tiny", argv=["--lr", "0.2"])
    assert seen == [replace(SMALL, lr=0.2)]


def test_positional_that_must_be_given(ends):
    cls = toy(("video", Path, setting(MISSING, "file", positional=True)))
    assert parse(cls, argv=["a.mp4"]).video == Path("a.mp4")
    assert "required: video" in ends(2, parse, cls, argv=[])


@pytest.mark.parametrize("bad, complaint", [
    (["--nope", "1"], "there is no setting --nope (--help all lists"),
    (["--step", "1"], "there is no setting --step; did you mean --steps?"),
    (["text", "--model=x", "--leftover=1"], "there is no setting --leftover"),
    (["--learning_rate", "1"], "there is no setting --learning_rate; did you mean --lr?"),
    (["--model_name_or_path=x"], "there is no setting --model_name_or_path (--help"),
    (["text", "why?", "more"], "unrecognized arguments: more; write the flag again before each further value"),
    (["--lr", "1e300"], "--lr 1e+300 makes no sense; give 1 or less"),
    (["--frames", "8", "9" * 12], "--frames 999999999999 makes no sense; give 10000000 or less"),
    (["--steps", "1.5"], "argument --steps: expected a whole number such as 1000, got '1.5'"),
    (["--steps", "0"], "--steps 0: expected at least 1"),
    (["--steps"], "argument --steps: expected one argument"),
    (["--resume", "https://x.y/z"], "argument --resume: https://x.y/z is an address; download the file, and give its path"),
    (["--lr", "nan"], "argument --lr: expected a number such as 0.5 or 1e-5, got 'nan'"),
    (["--lr", "fast"], "argument --lr: expected a number such as 0.5 or 1e-5, got 'fast'"),
    (["--frames"], "argument --frames: expected at least one argument"),
    (["--betas", "1"], "argument --betas: expected 2 arguments"),
    (["--preset", "x"], "argument --preset: invalid choice: 'x' (choose from"),
    (["sound"], "argument mode: invalid choice: 'sound' (choose from"),
    (["x" * 10**6], "argument mode: invalid choice: 'xxx"),
])  # fmt: skip
def test_bad(bad, complaint, ends, monkeypatch):
    assert ends(2, read, *bad).startswith(f"train.py: {complaint}")
    monkeypatch.setenv("RANK", "1")  # the other ranks leave as well, silently
    assert ends(2, read, *bad) == ""


def test_help(ends):
    said = ends(0, read, "--help")
    assert "100 % of them [1000]" in " ".join(said.split()) and "frames [8 16]" in said
    said = " ".join(ends(0, read, "--help", default="tiny").split())
    assert "100 % of them [1000; tiny: 3]" in said and "--[no-]offload offload [True; tiny: False]" in said
    assert "lr [1e-05]" in said


def test_help_in_groups(ends):
    """A title holds its setting and those below; a hidden one is listed by --help all alone, and can be set."""
    grouped = toy(
        ("lr", float, setting(1e-5, "rate", group="Optimizer")),
        ("steps", int, setting(10, "updates")),
        ("frames", int, setting(8, "frames", group="Data")),
        ("beta", float, setting(0.9, "decay", group="Optimizer", hidden=True)),
    )
    some, every = ends(0, parse, grouped, argv=["--help"]), ends(0, parse, grouped, argv=["--help", "all"])
    optimizer, data = some.split("Optimizer:")[1].split("Data:")
    assert "--lr" in optimizer and "--steps" in optimizer and "--frames" in data
    assert "--beta" not in some and "1 more settings: --help all" in some
    assert "--beta" in every.split("Optimizer:")[1].split("Data:")[0] and "more settings" not in every
    assert parse(grouped, argv=["--beta", "0.5"]).beta == 0.5


def test_help_ends_with_examples(ends, monkeypatch):
    """They are the commands under Run in the docstring of the file that defines the settings."""
    text = "What.\n\nRun       python a.py --x 50 %   first\n          torchrun a.py\n\n          why\nDiffers   python b.py"
    monkeypatch.setattr(sys.modules[Config.__module__], "__doc__", text)
    assert flags.examples(Config) == ["python a.py --x 50 %   first", "torchrun a.py"]
    said = ends(0, read, "--help")
    assert flags.SOURCES in said and said.endswith("examples:\n  python a.py --x 50 %   first\n  torchrun a.py\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_run_ends_with_a_sentence(rank, ends, monkeypatch):
    """Errors of our files are for the user; a rank that alone has one says it, after giving rank 0 its time."""
    slept = []
    monkeypatch.setattr(flags.time, "sleep", slept.append)
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, **WHERE}.items():
        monkeypatch.setenv(name, str(value))
    assert ends(2, flags.run, lambda cfg: read_picture("no.png"), Config) == "train.py: no.png: no such picture file\n"
    assert len(slept) == rank


def test_files_do_not_swallow_the_question():
    """`--image FILE "question"` is what people type; several pictures take the flag several times."""
    images = ("image", tuple[Path, ...], setting((), "picture files"))
    asking = toy(("question", str, setting("what?", "what to ask", positional=True)), images)
    for words in (["--image", "a.png", "how many?"], ["how many?", "--image", "a.png"]):
        assert parse(asking, argv=words) == asking("how many?", (Path("a.png"),))
    assert parse(asking, argv=["--image", "a", "--image", "b"]) == asking(image=(Path("a"), Path("b")))


def fail(error):
    raise error


@pytest.mark.parametrize("error, code, said", [
    (FloatingPointError("the loss is nan"), 2, "the loss is nan"),
    (OSError(28, "No space left on device"), 2, "No space left on device"),
    (KeyboardInterrupt(), 130, ""),
])  # fmt: skip
def test_run_tells_of_bad_numbers_and_full_disks_and_ends_quietly_when_asked(error, code, said, ends):
    assert said in (found := ends(code, flags.run, lambda cfg: fail(error), Config, argv=[]))
    assert bool(said) == bool(found)


@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError])
def test_run_keeps_the_traceback_of_our_own_mistakes(error):
    with pytest.raises(error, match="mine"):
        flags.run(lambda cfg: fail(error("mine")), Config, argv=[])  # this file stands for a library


def test_output_into_a_plain_file(monkeypatch):
    """Characters that the file lacks have a plain stand-in, warnings are sentences, progress is a line now and then."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))

    def main(cfg):
        print("\u2591\u2588 caf\u00e9", flush=True)
        for _ in range(2):
            flags.warn("film.mp4: cut")
        for _ in flags.progress(range(3000), "steps"):
            time.sleep(1e-4)
        sys.stderr.flush()

    flags.run(main, toy(), argv=[])
    out, err = (stream.buffer.getvalue().decode() for stream in (sys.stdout, sys.stderr))
    assert out == ".# caf?\n"
    assert err.startswith("warning: film.mp4: cut\n") and err.count("cut") == 1 and err.count("steps") <= 3


WHERE = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize("given, complaint", [
    ({"RANK": "x"}, "RANK is 'x' in the environment"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "no LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start with torchrun"),
    ({"RANK": "2", "WORLD_SIZE": "2"} | WHERE, "has RANK 2 of WORLD_SIZE 2"),
])  # fmt: skip
def test_half_of_what_torchrun_sets_is_refused(given, complaint, ends, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert complaint in ends(2, flags.run, print, Config, argv=[])


@pytest.mark.parametrize("words, complaint", [
    ("train_text --beta2 5", "--beta2 5.0"), ("train_text --grad-clip 0", "--grad-clip 0.0"),
    ("train_text --batch 1000000000000", "--batch 1"), ("train_vision --warmup 5", "--warmup 5.0"),
    ("vniah --needle-count 1000000000", "--needle-count 1"), ("longva --num_frames 3", "did you mean --frames?"),
])  # fmt: skip
def test_settings_that_would_overflow_or_never_end(words, complaint, ends):
    name, *words = words.split()
    assert complaint in ends(2, parse, importlib.import_module(name).Config, argv=words)


# ---- model folders -------------------------------------------------------------------------------


Models = toy(*((name, Path | None, setting(None, "folder")) for name in ("weights", "tokenizer")))
WHOLE = ("config.json", "model.safetensors.index.json", "a.safetensors")


def cached(folder, files, revision="new"):
    """A model in a cache: files as links to blobs; one that ends with "?" is a link that leads nowhere."""
    model = folder / "models--lab--Toy-7B"
    snapshot = model / "snapshots" / revision
    for below in (snapshot, model / "blobs", model / "refs"):
        below.mkdir(parents=True, exist_ok=True)
    for file in files:
        (snapshot / file.rstrip("?")).symlink_to(model / "blobs" / file)
        if not file.endswith("?"):
            (model / "blobs" / file).write_text('{"weight_map": {"x": "a.safetensors"}}' if "index" in file else "{}")
    (model / "refs/main").write_text("new\n")
    return snapshot


@pytest.mark.parametrize("variable, below", [
    ("HF_HUB_CACHE", "."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"), ("HOME", ".cache/huggingface/hub"),
])  # fmt: skip
def test_hub_names(tmp_path, monkeypatch, variable, below):
    """A cached model's snapshot is found by the model's name: main's, else the newest; a local folder comes first."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    old, new = (cached(tmp_path / below, WHOLE, revision) for revision in ("old", "new"))
    os.utime(old, (0, 0))
    assert parse(Models, argv=["--weights", "lab/Toy-7B", "--tokenizer", "Toy-7B"]) == Models(new, Path("Toy-7B"))
    assert flags.model_name(new) == "Toy-7B" and flags.model_name(Path("runs/x")) == "x"
    for main, found in (("old", old), ("gone", new)):
        (new.parents[1] / "refs/main").write_text(main)
        assert parse(Models, argv=["--weights", "lab/Toy-7B"]).weights == found
    Path("lab/Toy-7B").mkdir(parents=True)
    assert parse(Models, argv=["--weights", "lab/Toy-7B"]).weights == Path("lab/Toy-7B")


@pytest.mark.parametrize("files, complaint", [
    (None, "there is no folder lab/Toy-7B, nor such a model in {}; if it is in the Hub: hf download lab/Toy-7B"),
    (WHOLE[1:], "lab/Toy-7B is incomplete in {}, it lacks config.json; run again: hf download lab/Toy-7B"),
    (WHOLE[:2], "lab/Toy-7B is incomplete in {}, it lacks a.safetensors; run again"),
    (WHOLE[:1], "lab/Toy-7B is incomplete in {}, it lacks model.safetensors; run again"),
    ((*WHOLE, "vocab.json?"), "lab/Toy-7B is incomplete in {}, it lacks vocab.json; run again"),
])  # fmt: skip
def test_hub_names_that_are_not_whole(tmp_path, monkeypatch, ends, files, complaint):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    if files:
        cached(tmp_path, files)
    said = ends(2, parse, Models, argv=["--weights", "lab/Toy-7B"])
    assert f"argument --weights: {complaint.format(tmp_path)}" in said


def test_a_tokenizer_needs_no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = cached(tmp_path, ["tokenizer.json"])
    assert parse(Models, argv=["--tokenizer", "lab/Toy-7B"]).tokenizer == snapshot


def test_at_least():
    cfg = SimpleNamespace(steps=3, lengths=(4, 0), rate=None)
    flags.at_least(cfg, steps=3, lengths=0, rate=1)
    for least, said in (({"steps": 4}, "--steps 3"), ({"lengths": 1}, "--lengths 0")):
        with pytest.raises(ValueError, match=f"{said} makes no sense; give {max(least.values())} or more"):
            flags.at_least(cfg, **least)


def test_no_torch():
    code = "import data.flags, sys; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_torchrun_cannot_take_our_flags():
    """The list is the installed torchrun's, and a flag that would be lost is refused."""
    from torch.distributed.run import get_args_parser

    theirs = {o[2:] for a in get_args_parser()._actions for o in a.option_strings if o.startswith("--")}
    assert {name for name in theirs if "_" not in name} <= set(flags.TORCHRUN)
    for name in ("run", "log", "max", "start", "node", "rdzv", "local"):
        with pytest.raises(AssertionError, match="torchrun would take"):
            parse(toy((name, int, setting(1, "x"))), argv=[])
    for name in ("resume", "seed", "log_every", "role"):  # an exact match is passed on
        parse(toy((name, int, setting(1, "x"))), argv=[])


@pytest.mark.parametrize("name", ["longva", "train_text", "train_vision", "vniah", "data.pack"])
def test_help_of_a_script_can_be_read(name):
    """At most 25 settings are visible, each with its source, and three examples end the text."""
    module = importlib.import_module(name)
    visible = [field for field in dataclasses.fields(module.Config) if not field.metadata["hidden"]]
    assert len(visible) <= 25, f"{len(visible)} visible settings"
    assert len(flags.examples(module.Config)) == 3 or name == "data.pack"
