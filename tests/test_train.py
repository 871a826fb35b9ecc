"""Both training scripts as a user runs them: ranks agree, killed runs resume to the bit, mistakes get one sentence."""

import json
import re
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data.flags
import longva
import train_text
import train_vision
from data import chat, evaluate, llava, memory_saving, pack, synthetic, tokenizer, weights
from data.runs import TINY
from data.tiny import make
from tests.ranks import ALONE, Job

ROOT = Path(__file__).parents[1]
SMALL = "--device cpu --seq-len 64 --batch 4 --curriculum-steps 0".split()


def score_few(rank):
    """A rank's hook: a vision stage of the miniature is scored on 8 held-out samples at its end."""
    llava.HELD_OUT = 8


def here(script, *flags):
    """Run a script in this process, which has imported torch already; returns the exit code of a refusal."""
    module = {"train_text.py": train_text, "train_vision.py": train_vision}[script]
    torch.set_num_threads(1)
    try:
        with patch.object(llava, "HELD_OUT", 8):
            data.flags.run(module.main, module.Config, module.PRESETS, "tiny", [str(flag) for flag in flags])
    except SystemExit as refusal:
        return refusal.code
    return 0


def refusal(capsys, script, *flags):
    """The one sentence with which a script refuses, its progress bars apart."""
    capsys.readouterr()
    assert here(script, *flags) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    return sentence


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in lines(folder / "log.jsonl")]


def weights_of(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(one, two):
    """The same losses and exported weights, to the bit."""
    assert losses(one) == losses(two) and len(losses(one)) > 4
    weights_of_two = weights_of(two)
    for name, tensor in weights_of(one).items():
        assert torch.equal(tensor, weights_of_two[name]), name


def kill_and_resume(script, flags, folder, ranks):
    """Start, kill all with SIGKILL once the second state is there, start the same command again, to its end."""
    job = Job(script, folder, *flags, ranks=ranks, hook=score_few)
    job.wait_for((folder / "state" / "step-2").exists)
    for process in job.ranks:
        process.kill()
    assert job.codes() == [-signal.SIGKILL] * ranks, "it ended before it could be killed"
    return Job(script, folder, *flags, ranks=ranks, hook=score_few).end()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny base model, extended on two ranks, given eyes: every command of the README, a few steps each."""
    at = tmp_path_factory.mktemp("runs")
    base = [*SMALL, "--preset", "tiny-base", "--steps", 6, "--save-every", 1]
    assert here("train_text.py", *base, "--out", at / "base") == 0
    Job("train_text.py", at / "base-ranks", *base).end()
    twice = [*base, "--grad-accumulation", 2]
    assert here("train_text.py", *twice, "--out", at / "twice") == 0
    Job("train_text.py", at / "twice-rings", *twice, "--ring", 2, ranks=4).end()
    make.make_tower(at / "tower", 2, 8, "cpu")
    align = ["--stage", "align", "--weights", at / "base/model", "--tower", at / "tower/model", "--batch", 4]
    assert here("train_vision.py", *align, "--steps", 2, "--out", at / "align") == 0
    sft = ["--stage", "sft", "--weights", at / "align/model", "--batch", 4, "--steps", 5, "--save-every", 1]
    assert here("train_vision.py", *sft, "--out", at / "sft") == 0
    Job("train_vision.py", at / "sft-ranks", *sft, hook=score_few).end()
    return at, base, sft


@pytest.mark.ranks
@pytest.mark.parametrize("one, two", [("base", "base-ranks"), ("twice", "twice-rings"), ("sft", "sft-ranks")])
def test_ranks_agree(made, one, two):
    """One process, two ranks, two rings of two: the same losses to float32's tolerance, step after step."""
    a, b = losses(made[0] / one), losses(made[0] / two)
    assert len(a) == len(b) > 4
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=2e-5, atol=0)
    assert a[0] != a[-1]


@pytest.mark.ranks
@pytest.mark.parametrize("script, name, ranks", [
    ("train_text.py", "base", 1), ("train_text.py", "base-ranks", 2),
    ("train_vision.py", "sft", 1), ("train_vision.py", "sft-ranks", 2),
])  # fmt: skip
def test_killed_runs_resume_to_the_bit(made, tmp_path, script, name, ranks):
    at, base, sft = made
    assert "model:" in kill_and_resume(script, base if "text" in script else sft, tmp_path / "run", ranks)
    assert_same_run(at / name, tmp_path / "run")


def test_documents_apart_over_ranks_and_what_they_find(made, tmp_path, capsys):
    """Packed documents kept apart: two ranks agree with one; evaluation too; together the loss is another one."""

    def packed(first):
        (tmp_path / "docs").mkdir(exist_ok=True)
        for i in range(30):
            (tmp_path / "docs" / f"{i:02}.txt").write_text(synthetic.story(i, 30 + 11 * i) if i else first)
        pack.main(pack.Config((tmp_path / "docs",), synthetic.TOKENIZER, tmp_path / "tokens.npy", keep_short=1.0))
        return tmp_path / "tokens.npy"

    corpus = packed(synthetic.story(0, 30))
    flags = [*SMALL, "--weights", made[0] / "base/model", "--corpus", corpus, "--held-out", corpus]
    flags += "--steps 4 --save-every 2 --seq-len 128 --rope-theta 1e4 --cooldown 0".split()
    apart = [*flags, "--separate-documents"]
    assert here("train_text.py", *apart, "--out", tmp_path / "one") == 0
    Job("train_text.py", tmp_path / "two", *apart).end()
    assert here("train_text.py", *flags, "--out", tmp_path / "together") == 0
    one, two = (torch.tensor(losses(tmp_path / name)) for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=2e-5, atol=0)
    assert (one - torch.tensor(losses(tmp_path / "together"))).abs().min() > 1e-4
    scores = [lines(tmp_path / name / "eval.jsonl") for name in ("one", "two")]
    assert [line["step"] for line in scores[0]] == [2, 4]
    assert [line["needles_found"] for line in scores[0]] == [line["needles_found"] for line in scores[1]]
    assert scores[0][1]["perplexity"] == pytest.approx(scores[1][1]["perplexity"], rel=1e-4)
    more = [*flags, "--steps", 5]  # the rate is constant, so it goes on
    assert here("train_text.py", *more, "--out", tmp_path / "together") == 0
    assert "together resumes at step 4" in capsys.readouterr().out and len(losses(tmp_path / "together")) == 5
    packed("another")
    said = refusal(capsys, "train_text.py", *apart, "--out", tmp_path / "one")
    assert "the content of corpus has changed" in said


@pytest.mark.parametrize("name, theta, least, most", [("extended", 1e6, 1, 1), ("control", 1e4, 0, 0.49)])
def test_evaluation_finds_what_a_good_model_finds(tmp_path, name, theta, least, most):
    """The shipped extended model finds all numbers in 1024 tokens, among those of five other cities; its control few."""
    model, words = longva.load(TINY / name), tokenizer.load_tokenizer(TINY / name)
    sets = evaluate.eval_sets("synthetic", 1024, 2024, words)
    assert len(evaluate.eval_sets("synthetic", 1024, 2**40, words).needles) == 10  # any seed that the flags allow
    assert all(words.decode(ids[0].tolist()).count("The special magic") == 6 + 1 for ids, _ in sets.needles)
    scores = train_text.score_held_out(model, sets, None, ALONE)
    evaluate.log_scores(tmp_path, 7, scores, ())
    (line,) = lines(tmp_path / "eval.jsonl")
    assert line["step"] == 7 and least <= line["needles_found"] <= most


def test_perplexity_predicts_every_token_once():
    """From the window in which it stands late: as a plain loop."""
    model, words, S = longva.load(TINY / "control"), tokenizer.load_tokenizer(TINY / "control"), 64
    tokens = np.random.default_rng(0).integers(5, words.size, 301).astype(np.uint16)
    pairs = list(evaluate.perplexity_windows(tokens, S, 3, 2024, words))
    found = sum(model(ids, torch.arange(S), targets)[0].sum() for ids, targets in pairs)
    assert sum((targets != chat.IGNORE).sum() for _, targets in pairs) == S + S // 2 + S // 2
    want = 0
    for start in (0, S // 2, S):
        ids = torch.tensor(tokens[start : start + S + 1].astype(int))
        logp_SV = model.logits(model.model(model.embed(ids[None, :-1]), torch.arange(S)))[0].log_softmax(-1)
        want -= logp_SV.gather(-1, ids[1:, None])[S // 2 if start else 0 :].sum()
    assert found.item() == pytest.approx(want.item(), rel=1e-4)


def test_finished_runs_are_left_alone(made, capsys):
    """The same command once more changes nothing and says again what comes next; other settings are refused."""
    at, base, _ = made
    before = weights_of(at / "base")
    assert here("train_text.py", *base, "--out", at / "base") == 0 and "next:" in capsys.readouterr().out
    assert "save_every was 1, is 2" in refusal(capsys, "train_text.py", *base, "--save-every", 2, "--out", at / "base")
    assert all(torch.equal(before[key], tensor) for key, tensor in weights_of(at / "base").items())
    assert (at / "base" / "curve.png").stat().st_size > 1000


def test_exports_load(made):
    assert isinstance(longva.load(made[0] / "base/model"), longva.LM)
    model, words = longva.load(made[0] / "sft/model"), tokenizer.load_tokenizer(made[0] / "sft/model")
    assert isinstance(model, longva.LongVA) and words.size <= model.config.lm.vocab_size
    assert model.config.rule == "floor" and model.config.scheme == "unires"
    assert (made[0] / "sft/model/README.md").read_text().startswith("---\nlicense: mit\n")  # of our own parts alone


def test_align_changes_the_projector_alone_and_sft_everything(made):
    base, tower, align, sft = (weights_of(made[0] / name) for name in ("base", "tower", "align", "sft"))
    fresh = dict(weights.init_weights(longva.LongVA(longva.read_config(made[0] / "align/model")), 42))
    for name, tensor in align.items():
        if "mm_projector" in name:
            assert name.endswith("bias") or not torch.equal(tensor, fresh[name].bfloat16()), name
        elif name.startswith(weights.TOWER):
            assert torch.equal(tensor, tower["vision_model." + name.removeprefix(weights.TOWER)]), name
        else:
            assert torch.equal(tensor, base[name]), name
    still = {name for name in sft if torch.equal(align[name], sft[name])}
    assert not {name for name in still if "vision_tower" not in name and "norm" not in name and "bias" not in name}


@pytest.mark.parametrize("command, complaint", [
    ("train_text.py --steps 2 --weights nowhere", "nowhere"),
    ("train_text.py --sepq-len 2", "--sepq-len"),
    ("train_vision.py --stage sft --weights {base}", "language model"),
    ("train_vision.py --stage align --weights {sft} --tower {tower}", "sees already"),
    ("train_text.py --preset tiny-base --corpus README.md --weights {base}", "README.md"),
    ("train_text.py --preset tiny-base --corpus README.md", "--weights"),
    ("train_text.py --weights {sft}", "sees already"),
    ("train_vision.py --stage sft --weights nowhere", "--stage align first"),
    ("train_text.py --preset longva", "--corpus"),
    ("train_text.py --save-every 0", "--save-every 0 makes no sense; give 1 or more"),
    ("train_text.py --ring 2", "1 rank(s) cannot form rings of 2; choose one of 1"),
    ("train_text.py --lr -1", "--lr -1.0 makes no sense"),
    ("train_vision.py --stage sft --grids 0", "--grids 0 makes no sense"),
    ("train_vision.py --preset longva --stage align", "--weights"),
    ("train_vision.py --stage sft --weights {sft} --images nowhere", "--images nowhere is no folder"),
    ("train_vision.py --preset longva --stage sft --weights {sft}", "for the tiny model; give LLaVA"),
    ("train_vision.py --preset longva --stage sft --weights {sft} --scheme anyres --data x",
     "--scheme and --rule belong to --stage align"),
    ("train_vision.py --stage sft --max-skip-fraction 1.5", "--max-skip-fraction 1.5 makes no sense"),
    ("train_text.py --separate-documents", "nothing to separate; give a --corpus"),
    ("train_text.py --kernel cudnn --device cpu", "--kernel cudnn needs a CUDA GPU"),
    ("train_text.py --preset tiny-base --held-out README.md", "README.md is not a token file"),
    ("train_text.py --preset tiny-base --held-out synthetic --seq-len 32", "too short to ask"),
])  # fmt: skip
def test_mistakes_get_one_sentence(made, tmp_path, capsys, command, complaint):
    folders = {name: made[0] / name / "model" for name in ("base", "sft", "tower")}
    script, *flags = command.format(**folders).split()
    assert complaint in refusal(capsys, script, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()  # so that the mended command is not refused


@pytest.mark.parametrize("kernel, device, precision, complaint", [
    ("cpu", "cuda", "bf16", "needs tensors on the CPU"),
    ("cudnn", "cuda", "fp32", "takes no fp32"),
    ("cudnn", "cuda", "bf16", None), ("math", "cuda", "fp32", None), ("cpu", "cpu", "fp32", None),
    ("flash_attn", "cuda", "bf16", "needs the package flash-attn"), ("cuda", "cuda:75", "bf16", "capability 8.0"),
])  # fmt: skip
def test_kernels_that_cannot_run_are_refused(monkeypatch, kernel, device, precision, complaint):
    """A device "cuda:75" stands for a card of capability 7.5."""
    monkeypatch.setattr(memory_saving, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(device.index or 90, 10))
    with pytest.raises(ValueError, match=complaint) if complaint else nullcontext():
        assert memory_saving.choose_kernel(kernel, torch.device(device), precision, False) == kernel


def test_what_rings_cannot_share_evenly_is_refused():
    with pytest.raises(ValueError, match="accumulation 1 micro-batches cannot be divided evenly among 2 rings; change"):
        train_text.check(train_text.Config(**train_text.PRESETS["tiny"]), ALONE, 2)
    with pytest.raises(ValueError, match="3 samples cannot be shared evenly by 2 ranks or rings; change --batch"):
        train_vision.check(train_vision.Config(batch=3), 2)


def test_synthetic_targets_can_be_known():
    """Each target of a text batch follows from the text before it: the same question was answered there."""
    words = tokenizer.load_tokenizer(synthetic.TOKENIZER)
    ids_BT, targets_BT = synthetic.text_batch(words, seed=3, part=0, rows=40, tokens=64)
    assert torch.equal(ids_BT, synthetic.text_batch(words, seed=3, part=0, rows=40, tokens=64)[0])
    assert not torch.equal(ids_BT, synthetic.text_batch(words, seed=3, part=1, rows=40, tokens=64)[0])
    for ids, targets in zip(ids_BT.tolist(), targets_BT.tolist()):
        for t, target in enumerate(targets):
            if target != chat.IGNORE:  # the noun at t stood earlier, and the same word followed it
                assert any(ids[s] == ids[t] and ids[s + 1] == target for s in range(t)), (t, ids)


def test_magic_numbers_stand_anywhere_and_are_targets_where_stated_again():
    places, again = [], 0
    for seed in range(300):
        pieces = synthetic.magic_number_book(np.random.default_rng(seed), 256, 6)
        book = "".join(f"[{text}]" if learn else text for text, learn in pieces)
        stated: dict[str, str] = {}
        for city, number in re.findall(r"magic ([\w ]+) number is: ((?:\[?\d\]?)+)", book):
            digits = re.sub(r"\D", "", number)
            assert number == (re.sub(r"(\d)", r"[\1]", digits) if city in stated else digits), book
            assert stated.setdefault(city, digits) == digits, book
        again += book[: book.index("</book>")].count("magic") > len(stated)
        places.append(book.index("\nThe special") / book.index("</book>"))
    assert again > 150  # some number of most books is stated twice
    assert min(places) < 0.15 and max(places) > 0.9


def test_numbers_of_a_text_begin_alike():
    rng, alike = np.random.default_rng(0), {1: [], 2: [], 3: []}
    for digits in (1, 2, 3) * 100:
        numbers = synthetic.draw_numbers(rng, 20, digits)
        assert {len(number) for number in numbers} == {digits}
        alike[digits].append(sum(len({number[: n + 1] for number in numbers}) == 1 for n in range(digits)))
    assert set(alike[1]) == {0} and 35 < sum(alike[2]) < 65  # by none or one digit, as often
    assert min(alike[3].count(n) for n in (0, 1, 2)) > 20
    last = [len({number[-1] for number in synthetic.draw_numbers(rng, 20, 3)}) for _ in range(100)]
    assert 35 < sum(n <= 3 for n in last) < 65  # half of them made from three digits


def test_every_second_step_of_an_extension_has_short_texts():
    lengths = [synthetic.text_length(step, 2048, first_steps=2, short=256) for step in range(6)]
    assert lengths == [64, 64, 2048, 256, 2048, 256]
    assert [synthetic.text_length(step, 128, 0, 256) for step in range(2)] == [128, 128]  # none is longer than asked
    assert [synthetic.text_length(step, 256, 1, 0) for step in range(3)] == [64, 256, 256]


def test_texts_too_long_for_their_room_lose_their_end():
    words = tokenizer.load_tokenizer(synthetic.TOKENIZER)
    for tokens, part in ((1, 0), (1, 800), (20, 800), (30, 800)):
        ids_BT, targets_BT = synthetic.text_batch(words, 1, part, 40, tokens)
        assert ids_BT.shape == targets_BT.shape == (40, tokens)


def test_half_of_the_large_pictures_are_sparse_and_none_of_the_small_ones():
    sparse = 0
    for i in range(100):
        (picture,), turns = synthetic.conversation(3, i, 64)
        area = picture.width * picture.height // synthetic.SIDE**2
        sparse += area >= 56 and len(turns) <= 2 * 4  # 1 to 4 things, each asked for once, in as many grids as allowed
        (picture,), turns = synthetic.conversation(3, i, 8)
        assert len(turns) // 2 >= picture.width * picture.height // synthetic.SIDE**2 / 2
    assert 35 < sparse < 65


def test_a_text_stage_says_whether_it_worked(tmp_path, capsys):
    assert here("train_text.py", "--preset", "tiny-base", "--steps", "1", "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "held-out: loss" in said and "WARNING: this stage missed" in said
