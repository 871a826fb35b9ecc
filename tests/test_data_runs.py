"""A run's folder: settings that may not change, a log that survives being killed, a picture of the loss."""

import errno
import json
import math
import os
import signal
import stat
from pathlib import Path

import pytest
from PIL import Image

from data import runs

SETTINGS = {"out": Path("runs/x"), "steps": 10, "lr": 1e-5, "betas": (0.9, 0.95), "weights": None}


def entries(folder, name="log.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize("out, following", [
    ("runs/tiny-tower", runs.MINIATURE["tiny-tower"]),
    ("runs/mine", "train --tower runs/mine/model"),
    ("elsewhere/tiny-tower", "train --tower elsewhere/tiny-tower/model"),
])  # fmt: skip
def test_the_next_command_names_the_model_that_was_made(out, following, monkeypatch, capsys):
    monkeypatch.setattr(runs, "draw_curve", lambda folder: folder / "curve.png")
    runs.print_end(Path(out), "train --tower {}")
    assert capsys.readouterr().out.splitlines()[-1] == f"next:  {following}"


# ---- settings ------------------------------------------------------------------------------------


def test_settings_are_kept_and_found_again(tmp_path):
    folder = tmp_path / "new" / "run"
    runs.open_run(folder, SETTINGS)
    kept = json.loads((folder / "config.json").read_text())
    assert kept == {"out": "runs/x", "steps": 10, "lr": 1e-5, "betas": [0.9, 0.95], "weights": None, "inputs": {}}
    before = (folder / "config.json").read_bytes()
    runs.open_run(folder, dict(SETTINGS))  # the same command again
    assert (folder / "config.json").read_bytes() == before
    runs.LOCKS.pop(folder.resolve()).close()
    folder.rename(tmp_path / "moved")
    runs.open_run(tmp_path / "moved", {**SETTINGS, "out": tmp_path / "moved"})


@pytest.mark.parametrize("change, said", [
    ({"lr": 2e-5}, r"lr was 1e-05, is 2e-05"),
    ({"weights": Path("w"), "steps": 11}, r"steps was 10, is 11; weights was None, is 'w'"),
    ({"seed": 3}, r"seed was None, is 3"), ({"lr": None}, r"lr was 1e-05, is None"),
])  # fmt: skip
def test_other_settings_are_refused(tmp_path, change, said):
    runs.open_run(tmp_path, SETTINGS)
    before, now = (tmp_path / "config.json").read_bytes(), {**SETTINGS, **change}
    for settings in (now, {name: value for name, value in now.items() if value is not None}):  # or left out
        with pytest.raises(ValueError, match=rf"holds a run with other settings \({said}\); choose another --out"):
            runs.open_run(tmp_path, settings)
    assert (tmp_path / "config.json").read_bytes() == before


def test_more_steps_where_the_schedule_allows(tmp_path):
    runs.open_run(tmp_path, SETTINGS)
    runs.open_run(tmp_path, {**SETTINGS, "steps": 20}, more_steps=True)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 20
    for more_steps, steps in ((True, 5), (False, 30)):
        with pytest.raises(ValueError, match=r"steps was 20, is .*; the learning rate depends on the number of steps"):
            runs.open_run(tmp_path, {**SETTINGS, "steps": steps}, more_steps=more_steps)


def test_changed_inputs_are_refused(tmp_path):
    """By content: another time or place is the same input, another byte, name or file is not."""
    model, data, out = tmp_path / "model", tmp_path / "data.json", tmp_path / "run"
    model.mkdir()
    (model / "config.json").write_text("{}"), (model / "README.md").write_text("a"), data.write_text("[1]")
    inputs = {"weights": model, "data": data, "tower": None, "haystack": "synthetic"}
    runs.open_run(out, {**SETTINGS, **inputs}, inputs.keys())
    os.utime(data, (0, 0)), (model / ".cache").mkdir(), (model / "README.md").write_text("b")
    runs.open_run(out, {**SETTINGS, **inputs}, inputs.keys())
    model.rename(tmp_path / "moved")
    moved = {**inputs, "weights": tmp_path / "moved"}
    runs.open_run(out, {**SETTINGS, **moved}, moved.keys())
    for name, file, was, content in (("data", data, "[1]", "[2]"), ("weights", tmp_path / "moved/b", "", "")):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"holds a run on other data: the content of {name} has changed"):
            runs.open_run(out, {**SETTINGS, **moved}, moved.keys())
        file.write_text(was)


@pytest.mark.parametrize("content", ["[]", "[" * 10**5, "{", '{"inputs": 5}', '{"steps": []}'])
def test_damaged_settings_are_a_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="start anew") as said:
        runs.open_run(tmp_path, SETTINGS, more_steps=True)
    assert len(str(said.value).replace(str(tmp_path), "")) <= 300


# ---- files ---------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.txt"
    runs.replace_text(file, "old")
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, said in ((KeyError("mine"), "mine"), (full, r"a\.txt cannot be written \(No space left on device\)")):
        with pytest.raises(type(error), match=said), runs.drafted(file) as draft:
            draft.write_text("new, but only ha")
            raise error
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    (tmp_path / ".draft-b").write_text("left by a kill"), (tmp_path / ".tmpAbCdEf").write_text("by safetensors")
    (tmp_path / ".draft-folder/deep").mkdir(parents=True)
    (tmp_path / ".tmp").mkdir()  # somebody else's
    (tmp_path / ".tmp-notes").write_text("mine")
    runs.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp", ".tmp-notes", "a.txt"]


def test_a_folder_that_cannot_be_flushed_is_written_to(tmp_path, monkeypatch):
    """As on some network file systems; a file that cannot be flushed is an error still."""
    real, odd = os.fsync, OSError(errno.EINVAL, "Invalid argument")

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode) or odd.errno == errno.EIO:
            raise odd
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    runs.replace_text(tmp_path / "a.txt", "caf\u00e9 \udcff")  # also a path that is no UTF-8, in a card's command
    assert (tmp_path / "a.txt").read_bytes() == "caf\u00e9 ?".encode()
    odd.errno = errno.EIO
    with pytest.raises(OSError, match="cannot be written"):
        runs.replace_text(tmp_path / "b.txt", "b")


def test_a_checked_file_notices_damage(tmp_path):
    file = tmp_path / "a.json"
    assert runs.read_checked(file) == {}
    runs.write_checked(file, content := {"a": 1, "b": {"c": [0.1, None]}})
    assert runs.read_checked(file) == content
    text = file.read_text()
    for spoiled in (text.replace("1", "2", 1), text[:-9], "[]", '{"a": 1}'):
        file.write_text(spoiled)
        with pytest.raises(ValueError, match=r"a\.json (is|should)"):
            runs.read_checked(file)


# ---- the log -------------------------------------------------------------------------------------


def lines(first, last):
    return [{"step": step, "loss": 1 / (step + 1)} for step in range(first, last)]


def fill(folder, steps, name="log.jsonl"):
    runs.log(folder, *lines(0, steps), name=name)


def test_each_line_is_on_the_disk_before_a_state_can_be(tmp_path, monkeypatch):
    synced, fsync, file = [], os.fsync, tmp_path / "log.jsonl"
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(file.read_bytes()), fsync(handle)))
    told = [{"step": step, "loss": 0.1 + step, "note": "a\u2028b\nc"} for step in range(3)]
    for line in told:
        runs.log(tmp_path, line)
        assert entries(tmp_path)[-1] == line and synced[-1] == file.read_bytes()
    assert entries(tmp_path) == told and len(synced) == file.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("step, left", [(0, 0), (3, 3), (6, 6), (9, 6), (None, 6)])
def test_rewind_forgets_what_will_be_made_again(tmp_path, step, left):
    name = "probes.jsonl"
    runs.truncate_log(tmp_path, step, name)
    assert not list(tmp_path.iterdir())
    fill(tmp_path, 6, name), fill(tmp_path, 6)
    whole = (tmp_path / name).read_bytes()
    runs.truncate_log(tmp_path, step, name)
    assert [e["step"] for e in entries(tmp_path, name)] == list(range(left))
    assert whole.startswith((tmp_path / name).read_bytes()) and (tmp_path / "log.jsonl").read_bytes() == whole
    assert {f.name for f in tmp_path.iterdir()} == {name, "log.jsonl"}


def test_a_run_killed_anywhere_ends_with_the_same_log(tmp_path):
    """Killed after step 5 with a torn line of step 6, resumed from the state of step 4."""
    fill(tmp_path, 8)
    file = tmp_path / "log.jsonl"
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(ends[4], ends[5] + 1):  # the log cut at every byte of one line
        file.write_bytes(whole[:cut])
        runs.truncate_log(tmp_path, 4)
        runs.log(tmp_path, *lines(4, 8))
        assert file.read_bytes() == whole
    file.write_bytes(whole[:-1])
    runs.truncate_log(tmp_path)
    assert file.read_bytes() == whole  # a line that lacks only its end is kept


def test_damaged_lines_are_left_out_and_counted(tmp_path, capsys):
    fill(tmp_path, 2)
    file = tmp_path / "log.jsonl"
    whole = file.read_bytes()
    bad = [b"5", b"{}", b"null", b'{"step": "1"}', b"\xff", b'{"step": 2', b"[" * 10**5]
    file.write_bytes(b"\n".join([*bad, whole]))
    assert runs.column(tmp_path, "loss") == [1, 0.5] and runs.draw_curve(tmp_path)
    runs.truncate_log(tmp_path, 9)
    assert file.read_bytes() == whole
    assert "log.jsonl: 7 damaged line(s) left out, the first: line 1, " in capsys.readouterr().out


def test_a_resumed_run_says_where_and_what_the_log_lost(tmp_path, capsys):
    runs.resume_log(tmp_path, 0, 0)
    assert not capsys.readouterr().out
    fill(tmp_path, 3)
    runs.resume_log(tmp_path, 3, 0)
    assert capsys.readouterr().out == f"{tmp_path} resumes at step 3\n"
    runs.resume_log(tmp_path, 5, 0)
    assert "log.jsonl lacks 2 of 5 steps, the first: step 3" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_ends_the_loop_after_its_step_a_second_one_acts(number):
    seen, done, before, signals = [], [], signal.getsignal(number), runs.Signals(lambda x: x)
    signal.signal(number, lambda *_: seen.append("acts"))
    with pytest.raises(KeyboardInterrupt):
        for step in signals.steps(range(9)):
            assert not signals.came()
            if step == 2:
                os.kill(os.getpid(), number)
                assert signals.came() and not seen
                os.kill(os.getpid(), number)
            done.append(step)
    assert (done, seen) == ([0, 1, 2], ["acts"])
    os.kill(os.getpid(), number)
    assert seen == ["acts"] * 2
    signal.signal(number, before)


# ---- the picture ---------------------------------------------------------------------------------


def test_the_curve_shows_the_losses_their_running_mean_and_each_new_length(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, named, plot, write = [], [], Axes.plot, Axes.text

    def keep(axes, x, y, **how):
        drawn.append((list(x), list(y)))
        return plot(axes, x, y, **how)

    def keep_text(axes, x, y, said, **how):
        named.append((x, said))
        return write(axes, x, y, said, **how)

    monkeypatch.setattr(Axes, "plot", keep)
    monkeypatch.setattr(Axes, "text", keep_text)
    for step, loss, tokens in ((5, 4.0, 64), (6, 2.0, 2048), (7, 2.0, 64)):
        runs.log(tmp_path, {"step": step, "loss": loss, "seq_len": tokens})
    assert runs.draw_curve(tmp_path) == tmp_path / "curve.png"
    assert drawn == [([5, 6, 7], [4.0, 2.0, 2.0]), ([5, 6, 7], pytest.approx([4.0, 3.9, 3.805]))]
    assert named == [(5, " 64 tokens"), (6, " 2,048 tokens")]
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (900, 480)
        assert len(picture.convert("RGB").resize((90, 48)).getcolors(90 * 48)) > 3  # not an empty page


def test_a_stage_says_whether_it_worked(capsys):
    for loss, score, warns in ((0.01, 1.0, False), (0.03, 1.0, True), (0.01, 0.8, True), (math.nan, 1.0, True)):
        runs.print_verdict(loss, score, (0.02, 0.9))
        said = capsys.readouterr().out
        assert "(expected at most 0.02)" in said and "(expected at least 0.9)" in said and ("WARNING" in said) == warns
    runs.print_verdict(math.nan, 0.0, ())
    assert capsys.readouterr().out == ""


def test_a_loss_that_is_no_number_names_its_step_and_micro_batch():
    assert runs.sum_finite(3, [1.0, 2.0]) == 3
    with pytest.raises(FloatingPointError, match="step 3, micro-batch 1 of 2: the loss is nan"):
        runs.sum_finite(3, [1.0, math.nan])


def test_the_digest_of_a_large_file_reads_little_and_sees_its_size_and_ends(tmp_path, monkeypatch):
    for name, value in (("LARGE", 1000), ("SAMPLES", 4), ("SAMPLE_BYTES", 10)):
        monkeypatch.setattr(runs, name, value)
    file, found = tmp_path / "corpus", set()
    for content in (b"a" * 900, b"a" * 899 + b"b", b"a" * 5000, b"a" * 5001, b"b" + b"a" * 4999, b"a" * 4999 + b"b"):
        file.write_bytes(content)
        found.add(runs.digest(file))
    assert len(found) == 6
    file.write_bytes(b"a" * 500 + b"b" + b"a" * 4499)  # between two samples: the price of a bounded time
    assert runs.digest(file) in found
