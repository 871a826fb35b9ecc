"""The vision stages: what a step learns on one rank and on many, what is trained, what is left out, and preference."""

import json
import os
import re
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import longva
import ring
import train_vision as tv
from data import chat, flags, llava, synthetic, tokenizer
from data.runs import TINY
from tests import ranks
from tests.ranks import ALONE
from tests.test_train import ROOT, assert_same_run, here, kill_and_resume, lines, refusal, score_few, weights_of

WORDS = tokenizer.load_tokenizer(synthetic.TOKENIZER)
NUMBER = "Which number is on the star?"


def settings(stage="sft", model="longva", **changes):
    """The miniature's settings of a stage that starts from a shipped model, with room for long samples."""
    given = {"stage": stage, "weights": TINY / model, "device": "cpu", "max_len": 2048, **changes}
    return tv.resolve(tv.Config(**tv.PRESETS["tiny"] | given))


# ---- samples -------------------------------------------------------------------------------------


@cache
def picture(i, most=4):
    return synthetic.conversation(7, i, most)[0][0]


@cache
def film(i, frames=3):
    return synthetic.preference(7, i, frames)[0][0]


def ask(*shown, said="7", more=()):
    """What is shown, in front of a question, and its answer."""
    question = "<image>\n" * len(shown) + NUMBER
    return [*shown], [[("user", question), ("assistant", said), *more]]


MORE = (("user", "Which colour is the moon?"), ("assistant", "red"))
MIXED = [
    ask(picture(0, 9), picture(1)),
    ask(more=MORE),
    ask(film(0)),
    ask(picture(1), film(0), picture(2, 9), said="3", more=MORE),  # a picture and a film that came before
    ask(film(1), more=MORE * 3),
    ask(picture(3, 16), said="red"),
    ask(picture(4), more=MORE),
    ask(said="0"),
]
PAIRS = [synthetic.preference(7, i, 3) for i in range(4)]
PAIRS[1] = ([picture(5)], PAIRS[1][1])
BEFORE = -torch.tensor([[3.0, 5.0], [9.0, 2.0], [1.0, 25.0], [30.0, 6.0]], dtype=torch.float64)


def dataset_of(samples):
    """A data set of these samples; one that is a string is broken, and this is why."""

    def get(i):
        if isinstance(samples[i], str):
            raise ValueError(samples[i])
        return samples[i]

    return llava.Dataset(len(samples), None, get)


ONE = ring.RingGroup(ALONE, 0, 1)


def loader_of(cfg, config, dataset, rings=ONE):
    return tv.make_loader(cfg, dataset, config, WORDS, rings)


def prepared(cfg, config, samples):
    """Examples of samples, which must be usable."""
    loader = loader_of(cfg, config, dataset_of(samples))
    return [loader.prepare(i, *sample) for i, sample in enumerate(samples)]


def learn(cfg, world, samples, reference=None):
    """(what a step logs, gradients by name) of all samples as one step, and the reports of what was left out."""
    rings = ring.split_groups(world, cfg.ring)
    model, _ = tv.build_sharded_model(replace(cfg, batch=len(samples)), world)
    loader = loader_of(cfg, model.config, dataset_of(samples), rings)
    batches, skipped = loader.micro_batches([*range(len(samples))])
    loss = tv.NextTokenLoss() if reference is None else tv.DPOLoss(reference, cfg.beta, rings.ring)
    told = tv.train_step(model, batches, loss, cfg.offload, world)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return told, whole, skipped


def same(many, one):
    """Equal logs and gradients, to float32's accuracy."""
    assert many[0].keys() == one[0].keys()
    for name, value in one[0].items():
        assert many[0][name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    assert many[1].keys() == one[1].keys()
    largest = max(g.norm() for g in one[1].values())
    for name, g in one[1].items():
        assert (many[1][name] - g).norm() < 2e-4 * g.norm() + 1e-6 * largest, name


def synthetic_samples(cfg):
    """The miniature's samples of a stage."""
    return llava.synthetic_dataset(cfg.stage, cfg.seed, cfg.batch, cfg.frames, cfg.grids, 0)


# ---- ranks ---------------------------------------------------------------------------------------


def rings_agree(world, *_):
    for scheme, name, at_once in (("unires", "longva", None), ("anyres", "anyres", 1)):
        cfg = settings(model=name, scheme=scheme, ring=2)
        same(learn(replace(cfg, micro_batch_size=at_once), world, MIXED), learn(replace(cfg, ring=1), ALONE, MIXED))


def all_of_a_part_may_be_broken(world, *_):
    """What one rank cannot read, its ring leaves out, and the rest is learned as if alone."""
    some = ["is broken" if i % 2 else sample for i, sample in enumerate(MIXED)]
    cfg = settings()
    one = learn(cfg, ALONE, MIXED[::2])
    blind = some if world.rank else MIXED  # rank 1 alone
    for size, at_once, samples in ((1, None, some), (2, 1, blind)):
        told, gradients, faults = learn(replace(cfg, ring=size, micro_batch_size=at_once), world, samples)
        same((told, gradients), one)
        reported = [{"sample": i, "why": "is broken"} for i in (1, 3, 5, 7)]
        assert faults == reported * world.rank


def preference_on(world, *_):
    cfg = settings("dpo", beta=0.3)
    one = textbook(cfg)
    for size, at_once in ((1, None), (1, 1), (world.ranks, 1)):
        same(learn(replace(cfg, ring=size, micro_batch_size=at_once), world, PAIRS, BEFORE), one)


def reference_on(world, folder, *_):
    """What is thought of a pair before training, of each once, the broken one apart; read again by a later run."""
    cfg = settings("dpo", batch=4)
    known = torch.cat([torch.zeros(1, 2), slowly(cfg)[0].detach().double()])
    dataset = dataset_of(["is broken", *PAIRS])
    for size, at_once in ((1, 1), (2, None)):
        cfg = replace(cfg, ring=size, micro_batch_size=at_once, out=folder / f"reference-{size}")
        cfg.out.mkdir(exist_ok=True)
        rings = ring.split_groups(world, size)
        model, _ = tv.build_sharded_model(cfg, world)
        loader = loader_of(cfg, model.config, dataset, rings)
        found = tv.reference_logps(cfg, 0, model, loader, rings, world)
        torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)
        ring.all_reduce_sum(torch.zeros(1), world)  # rank 0 has written
        again = tv.reference_logps(cfg, 3, None, loader, rings, world)
        assert torch.equal(found, again) and dataset.unreadable == {0}
        batches, _ = loader.micro_batches([1, 2, 3, 4])
        told = tv.train_step(model, batches, tv.DPOLoss(found, cfg.beta, rings.ring), cfg.offload, world)
        assert told["loss"] == pytest.approx(np.log(2), abs=1e-5) and told["margin"] == pytest.approx(0, abs=1e-4)


def stages_without_a_picture(world, *_):
    """A rank without a picture, and one with a film alone, use the parameters that the others use."""
    cfg = settings(model="anyres")
    for samples in ([ask(picture(0)), ask()], [ask(film(0)), ask(picture(0))]):
        same(learn(cfg, world, samples), learn(cfg, ALONE, samples))


def on(world, *flags):
    """Run the script on the ranks that are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "start", lambda device: world)
        patch.setattr(ring, "stop", lambda: None)
        patch.setattr(os, "_exit", lambda code: None)  # flags.run ends a rank so; here more checks follow
        assert here("train_vision.py", *flags) == 0


def both_stages_one_after_the_other(world, folder, *_):
    """Rank 1 of a ring has nothing to write, and still begins with sft when rank 0 has written what align made."""
    os.chdir(folder)
    on(world, *"--stage both --device cpu --steps 2 --batch 2 --ring 2".split())
    align, sft = (folder / f"runs/tiny-longva-{stage}" for stage in ("align", "sft"))
    for out in (align, sft):
        assert [line["skipped"] for line in lines(out / "log.jsonl")] == [0, 0]
    assert json.loads((sft / "config.json").read_text())["weights"] == "runs/tiny-longva-align/model"
    assert not torch.equal(weights_of(align)["lm_head.weight"], weights_of(sft)["lm_head.weight"])


def each_rank_reports_what_it_found(world, folder, flags):
    """Records 2 and 5 are missing, which ranks 0 and 1 see when they divide the file; 1 and 7 end early."""
    out = folder / "reported"
    on(world, *flags, "--max-skip-fraction", 0.4, "--batch", 10, "--steps", 1, "--out", out)
    assert [line["id"] for line in lines(out / f"unusable-{world.rank}.jsonl")] == [["r2"], ["r5"]][world.rank]
    both = [line["id"] for rank in (0, 1) if (f := out / f"skipped-{rank}.jsonl").exists() for line in lines(f)]
    assert sorted(both) == ["r1", "r7"] and [line["skipped"] for line in lines(out / "log.jsonl")] == [2]


@pytest.mark.ranks
def test_two_ranks(tmp_path):
    checks = [rings_agree, stages_without_a_picture, all_of_a_part_may_be_broken, preference_on]
    checks += [reference_on, each_rank_reports_what_it_found, both_stages_one_after_the_other]
    ranks.run(2, checks, tmp_path, records(tmp_path, missing=[2, 5], cut=[1, 7]))


@pytest.mark.ranks
def test_two_rings_of_two():
    ranks.run(4, [rings_agree])


def test_shards_cut_pictures_and_grids():
    """The batch above does test it: a border lies inside a grid, which two ranks see, and each sees what it needs."""
    cfg = settings()
    config = longva.read_config(cfg.weights)
    examples, worlds = prepared(cfg, config, MIXED), [replace(ALONE, rank=rank, ranks=2) for rank in range(2)]
    sides = [tv.collate(examples, config, WORDS.pad_id, world).model_inputs for world in worlds]
    whole = torch.cat([ids_BT for ids_BT, *_ in sides], dim=1)[:, torch.cat([idx for _, idx, *_ in sides]).argsort()]
    border = whole.shape[1] // 4  # where rank 1 takes over
    before = (whole[:, :border] == chat.IMAGE).sum(1)
    inside = (whole[:, border - 1] == chat.IMAGE) & (whole[:, border] == chat.IMAGE)
    assert (inside & (before % 4 > 0)).any()
    both = [{grid.numpy().tobytes() for grid in pixels} for _, _, _, pixels, *_ in sides]
    assert both[0] & both[1] and both[0] - both[1] and both[1] - both[0]
    assert all(len(rows) == len(places) == (ids == chat.IMAGE).sum() for ids, *_, rows, places in sides)


# ---- what is seen, and what learns ---------------------------------------------------------------


@pytest.mark.parametrize("stage, samples, grids", [
    ("sft", [ask(film(0), film(0)), ask(film(0)[:2]), ask()], 8), ("dpo", [PAIRS[0], PAIRS[0], PAIRS[2]], 9),
])  # fmt: skip
def test_both_answers_of_a_pair_share_its_film(stage, samples, grids):
    cfg = settings(stage)
    model, _ = tv.build_sharded_model(cfg, ALONE)
    calls = []
    model.tower.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    model(*tv.collate(prepared(cfg, model.config, samples), model.config, WORDS.pad_id, ALONE).model_inputs)
    assert calls == [grids]


@pytest.mark.parametrize("scheme, name", [("unires", "longva"), ("anyres", "anyres")])
def test_repeated_grids_give_what_separate_ones_give(scheme, name):
    """Tokens put in their places by number are those that the model makes picture by picture."""
    cfg = settings(model=name)
    model, _ = tv.build_sharded_model(cfg, ALONE)
    examples = prepared(cfg, model.config, MIXED)
    nll_B, _ = model(*tv.collate(examples, model.config, WORDS.pad_id, ALONE).model_inputs)
    for example, nll in zip(examples, nll_B):
        ids, targets = chat.pad(example.texts, WORDS.pad_id)
        pixels = torch.cat([pixels for pixels, *_ in example.images] or [torch.zeros(0, 3, 32, 32)])
        plainly, _ = model(ids, torch.arange(ids.shape[1]), targets, pixels, [how for _, how in example.images])
        torch.testing.assert_close(plainly[0], nll, rtol=1e-4, atol=1e-4)


def test_align_builds_no_graph_in_what_is_frozen():
    cfg = settings("align", "extended", tower=TINY / "tower")
    model, groups = tv.build_sharded_model(cfg, ALONE)
    made = []
    model.tower.register_forward_hook(lambda module, arguments, z_NPE: made.append(z_NPE))
    batches, _ = loader_of(cfg, model.config, synthetic_samples(cfg)).micro_batches([0, 1, 2])
    tv.train_step(model, batches, tv.NextTokenLoss(), cfg.offload, ALONE)
    assert [z_NPE.grad_fn for z_NPE in made] == [None] and not made[0].requires_grad
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert [group["peak"] for group in groups] == [cfg.lr] and len(groups[0]["params"]) == 4


@pytest.mark.parametrize("samples", [[ask(), ask(more=MORE)], [ask(film(0))]], ids=["text", "film"])
def test_a_batch_without_pictures_uses_the_same_parameters(samples):
    """Text alone, or a film alone, gives a gradient to every parameter that a picture does, if need be of zero."""
    cfg = settings(model="anyres")
    with_pictures, without = learn(cfg, ALONE, [ask(picture(0))])[1], learn(cfg, ALONE, samples)[1]
    assert with_pictures.keys() == without.keys()
    eye = [name for name in without if "vision_tower" in name or "mm_projector" in name]
    assert eye and all(bool(without[name].any()) == (samples[0][0] != []) for name in eye if "k_proj.bias" not in name)


def test_parts_of_a_step_add_up():
    cfg = settings()
    whole = learn(cfg, ALONE, MIXED)
    for at_once in (1, 3):
        same(learn(replace(cfg, micro_batch_size=at_once), ALONE, MIXED), whole)


# ---- labels and lengths --------------------------------------------------------------------------


@pytest.mark.parametrize("stage, labels, template", [
    ("sft", "released", "qwen_1_5"), ("sft", "clean", "qwen_1_5"), ("align", "clean", "plain"),
])  # fmt: skip
def test_labels_are_those_of_stage_and_setting(stage, labels, template):
    """test_data_chat.py writes them out; the label of a token is the target of the one before it."""
    cfg = settings(stage, labels=labels)
    config = longva.read_config(cfg.weights)
    ids, wanted = chat.example(WORDS, ask(film(0)[:1])[1][0], [4], template, labels == "clean")
    examples = prepared(cfg, config, [ask(film(0)[:1])])
    ids_BT, _, targets_BT, *_ = tv.collate(examples, config, WORDS.pad_id, ALONE).model_inputs
    assert ids_BT.tolist() == [ids] and targets_BT.tolist() == [[*wanted[1:], chat.IGNORE]]


def trim(turns, max_len):
    return llava.tokenize_and_trim(WORDS, turns, [4], "qwen_1_5", True, max_len)


def test_questions_go_before_pictures_are_cut():
    turns = [("user", f"<image>\n{NUMBER}"), ("assistant", "7"), *MORE, *MORE]
    whole = {n: chat.example(WORDS, turns[:n], [4]) for n in (2, 4, 6)}
    for n in (6, 4, 2):
        for spare in (0, 1):
            assert trim(turns, len(whole[n][0]) + spare) == whole[n]
    fits = len(whole[2][0])
    late = [*MORE, ("user", f"<image>\n{NUMBER}"), ("assistant", "7")]
    for said in (turns, turns[:2], [("assistant", "Hi"), *turns], late):
        with pytest.raises(ValueError, match=f"with 4 visual tokens does not fit --max-len {fits - 1}; raise it"):
            trim(said, fits - 1)
    assert trim([*turns[:4], ("user", "Bye")], fits) == whole[2]


# ---- broken samples ------------------------------------------------------------------------------


def records(folder, count=12, missing=(), cut=()):
    """A data file with a picture each, PNG and JPEG in turn, of which some are not there, and some end early."""
    (folder / "images").mkdir(exist_ok=True)
    written = []
    for i in range(count):
        file = folder / "images" / f"{i}.{('png', 'jpg')[i % 2]}"
        picture(i, 9).resize((256, 256)).save(file)
        if i in missing:
            file.unlink()
        elif i in cut:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        said = [{"from": "human", "value": f"<image>\n{NUMBER}"}, {"from": "gpt", "value": str(i % 10)}]
        written.append({"id": f"r{i}", "image": file.name, "conversations": said})
    (folder / "data.json").write_text(json.dumps(written))
    flags = ["--data", folder / "data.json", "--images", folder / "images", "--device", "cpu", "--grids", 4]
    return [*flags, "--stage", "sft", "--weights", TINY / "longva", "--save-every", 1]


def test_broken_pictures_are_left_out_and_reported(tmp_path, capsys):
    """Each of 11 usable records comes once in a step; two of them end early, one was missing from the start."""
    out = tmp_path / "out"
    flags = [*records(tmp_path, missing=[2], cut=[5, 8]), "--max-skip-fraction", 0.3]
    flags += ["--batch", 11, "--steps", 2, "--out", out]
    assert here("train_vision.py", *flags) == 0
    assert "1 of 12 records are bad" in capsys.readouterr().out
    (unusable,) = lines(out / "unusable-0.jsonl")
    assert unusable["record"] == 2 and unusable["id"] == "r2" and "2.png" in unusable["why"]
    skipped = sorted(lines(out / "skipped-0.jsonl"), key=lambda line: (line["step"], line["record"]))
    reported = [(line["step"], line["record"], line["id"], line["why"].partition(": ")[0]) for line in skipped]
    assert reported == [(step, *one) for step in (0, 1) for one in ((5, "r5", "shows 5.jpg"), (8, "r8", "shows 8.png"))]
    logged = lines(out / "log.jsonl")
    assert [line["skipped"] for line in logged] == [2, 2] and all(np.isfinite(line["loss"]) for line in logged)
    (tmp_path / "data.json").write_text(json.dumps(json.loads((tmp_path / "data.json").read_text())[::-1]))
    assert "the content of data has changed" in refusal(capsys, "train_vision.py", *flags)


def test_too_many_missing_pictures_stop_the_run_before_it_begins(tmp_path, capsys):
    flags = [*records(tmp_path, missing=[1, 2]), "--max-skip-fraction", 0.1, "--out", tmp_path / "out"]
    said = refusal(capsys, "train_vision.py", *flags)
    assert "2 of 12 records are bad, more than --max-skip-fraction 0.1 allows: record 1 (id 'r1') shows 1.jpg" in said
    assert not (tmp_path / "out").exists()


def test_a_run_that_continues_knows_what_was_skipped_before(tmp_path, capsys):
    """One broken picture of 12 may be skipped; the second one ends the run, and again when it is started once more."""
    flags = [*records(tmp_path, cut=[0, 1]), "--max-skip-fraction", 0.1, "--batch", 2, "--steps", 6]
    for _ in range(2):
        said = refusal(capsys, "train_vision.py", *flags, "--out", tmp_path / "out")
        assert "2 samples of 12 could not be used, more than --max-skip-fraction 0.1 allows" in said
        assert sum(line["skipped"] for line in lines(tmp_path / "out/log.jsonl")) == 1
        assert len(lines(tmp_path / "out/skipped-0.jsonl")) == 2


def test_a_step_without_a_sample_leaves_the_parameters_alone(tmp_path, capsys, monkeypatch):
    """And a run does not go on with other records than it began with: they would come in another order."""
    flags = [*records(tmp_path, 4, cut=[1]), "--max-skip-fraction", 0.3, "--batch", 1, "--steps", 4]
    flags += ["--out", tmp_path / "out"]
    saved, save = [], ring.save_state

    def save_state(folder, model, *rest):
        saved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        save(folder, model, *rest)

    monkeypatch.setattr(ring, "save_state", save_state)
    assert here("train_vision.py", *flags) == 0
    logged = lines(tmp_path / "out/log.jsonl")
    (at,) = [line["step"] for line in logged if line["skipped"]]
    assert at > 0 and ["loss" in line for line in logged] == [step != at for step in range(4)]
    assert [torch.equal(saved[step - 1], saved[step]) for step in (1, 2, 3)] == [step == at for step in (1, 2, 3)]
    (tmp_path / "images/3.jpg").unlink()
    said = refusal(capsys, "train_vision.py", *flags)
    assert "usable_records was '4 of 4, " in said and "bring the missing pictures back, then run the same" in said


# ---- preference ----------------------------------------------------------------------------------


def slowly(cfg):
    """(logp_P2 of the pairs' answers, from all logits, the model)."""
    model, _ = tv.build_sharded_model(cfg, ALONE)
    logp = []
    for example in prepared(cfg, model.config, PAIRS):
        pixels, layouts = zip(*example.images)
        for ids, labels in example.texts:
            seen_ID = model.encode_images(torch.cat(pixels), layouts)
            h_BTD = model.model(model.embed(torch.tensor([ids]), seen_ID), torch.arange(len(ids)))
            each = model.logits(h_BTD)[0, :-1].log_softmax(-1)
            logp.append(sum(each[t, label] for t, label in enumerate(labels[1:]) if label != chat.IGNORE))
    return torch.stack(logp).view(-1, 2), model


def textbook(cfg):
    """(what is logged, gradients) of -logsigmoid(beta ((pc - pr) - (rc - rr))), by autograd."""
    logp_P2, model = slowly(cfg)
    (chosen, rejected), (before_chosen, before_rejected) = logp_P2.T, BEFORE.T
    margin = cfg.beta * ((chosen - rejected) - (before_chosen - before_rejected))
    loss = -F.logsigmoid(margin).mean()
    loss.backward()
    told = {"loss": loss, "margin": margin.mean(), "preferred": (chosen > rejected).double().mean()}
    told |= {"accuracy": (margin > 0).double().mean(), "chosen": cfg.beta * (chosen - before_chosen).mean()}
    told |= {"rejected": cfg.beta * (rejected - before_rejected).mean()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in told.items()}, gradients


@pytest.mark.parametrize("at_once", [3, None])
def test_preference_is_the_textbook_s(at_once):
    cfg = settings("dpo", beta=0.3)
    same(learn(replace(cfg, micro_batch_size=at_once), ALONE, PAIRS, BEFORE), textbook(cfg))


def test_rates_over_the_steps():
    """dpo: up for a tenth of the steps, then a line to zero; the rest: 3 %, then a cosine."""
    dpo, sft = (tv.resolve(tv.Config(stage=stage, weights=ROOT)) for stage in ("dpo", "sft"))
    rates = [tv.learning_rate(1.0, step, 400, dpo.warmup, True) for step in range(400)]
    assert rates[:41] == pytest.approx([*np.arange(1, 41) / 40, 1.0])
    assert rates[40:] == pytest.approx([(400 - step) / 360 for step in range(40, 400)])
    rates = [tv.learning_rate(2.0, step, 1000, sft.warmup, False) for step in range(1000)]
    assert rates[:31] == pytest.approx([*2 * np.arange(1, 31) / 30, 2.0])
    assert rates[515] == pytest.approx(1.0) and rates[999] < 1e-5 and sorted(rates[30:], reverse=True) == rates[30:]
    assert [tv.learning_rate(1.0, step, 100, 0.014, True) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]  # ceil(1.4) steps
    assert tv.learning_rate(1.0, 1, 10, 0.0, True) == 0.9  # no warm-up: the fall begins at once, as transformers'
    assert (dpo.lr, dpo.tower_lr, dpo.beta, dpo.warmup) == (5e-7, 5e-7, 0.1, 0.1)


def test_each_stage_of_anyres_expects_its_own_score():
    stages = [tv.resolve(tv.Config(**tv.PRESETS["tiny-anyres"] | {"stage": stage})) for stage in tv.TINY_STAGES]
    expected = {stage: values["expected"] for stage, values in tv.TINY_STAGES.items()} | {"sft": (0.1, 0.95)}
    assert {cfg.stage: cfg.expected for cfg in stages} == expected


PREFERRING = "--stage dpo --device cpu --frames 4 --steps 80 --batch 8 --lr 2e-4 --tower-lr 2e-4".split()
PREFERRING += ["--weights", TINY / "longva"]


@pytest.fixture(scope="module")
def preferring(tmp_path_factory):
    """The shipped model, taught to say what colour a thing has where it has no number."""
    out = tmp_path_factory.mktemp("dpo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llava, "SYNTHETIC_PAIRS", 128)
        assert here("train_vision.py", *PREFERRING, "--out", out) == 0
    return out


def test_preference_is_learned(preferring, capsys):
    """The preferred answers' share of held-out pairs rises, also with a batch that does not divide these 128."""
    for folder in (TINY / "longva", preferring / "model"):
        tv.print_held_out_score(settings("dpo", frames=4, batch=48), longva.load(folder), WORDS, ONE, ALONE)
    before, after = (float(score) for score in re.findall(r"held-out: .* score ([\d.]+)", capsys.readouterr().out))
    assert after > max(0.88, before + 0.1), (before, after)
    told = lines(preferring / "log.jsonl")
    assert told[0]["margin"] == pytest.approx(0, abs=1e-4) and told[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert np.mean([line["margin"] for line in told[-8:]]) > 0.3
    assert np.mean([line["accuracy"] for line in told[-8:]]) > 0.8
    assert told[-1]["chosen"] - told[-1]["rejected"] == pytest.approx(told[-1]["margin"])
    shipped = {name: p.shape for name, p in longva.load(TINY / "longva").named_parameters()}
    assert {name: tensor.shape for name, tensor in weights_of(preferring).items()} == shipped


def test_the_reference_is_asked_once(preferring, tmp_path, monkeypatch, capsys):
    """A run that goes on reads what the reference thought; one that has lost it cannot go on, and says so."""
    monkeypatch.setattr(llava, "SYNTHETIC_PAIRS", 128)
    monkeypatch.setattr(llava, "write_reference", None)  # it is computed no second time
    flags = [*PREFERRING, "--out", shutil.copytree(preferring, tmp_path / "run")]
    known = tmp_path / "run" / "reference.safetensors"
    assert here("train_vision.py", *flags) == 0
    known.write_bytes(known.read_bytes()[:-1] + b"x")
    assert "reference.safetensors is damaged" in refusal(capsys, "train_vision.py", *flags)
    known.unlink()
    assert "reference.safetensors is gone" in refusal(capsys, "train_vision.py", *flags)


def test_a_pair_without_a_reference_is_left_out(tmp_path, monkeypatch):
    """One that could not be read when the reference was asked is not learned from later, also by a run that goes on."""
    read, asked = synthetic.preference, []

    def once_broken(seed, i, frames):
        asked.append(i)
        if i == 3 and asked.count(3) == 1:
            raise ValueError("is a stale file handle")
        return read(seed, i, frames)

    monkeypatch.setattr(llava, "SYNTHETIC_PAIRS", 8)
    monkeypatch.setattr(synthetic, "preference", once_broken)
    cfg = settings("dpo", out=tmp_path, batch=8, steps=2, frames=3, max_skip_fraction=0.5)
    tv.train(cfg, ALONE)
    told, reports = lines(tmp_path / "log.jsonl"), lines(tmp_path / "skipped-0.jsonl")
    assert told[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and [line["skipped"] for line in told] == [1, 1]
    assert [(report["step"], report["sample"]) for report in reports] == [(0, 3), (1, 3)]
    loader = loader_of(cfg, longva.read_config(TINY / "longva"), synthetic_samples(cfg))
    again = tv.reference_logps(cfg, 1, None, loader, ONE, ALONE)
    assert loader.dataset.unreadable == {3} and not again[3].any() and again[[0, 1, 2, 4, 5, 6, 7]].all()


@pytest.mark.parametrize("preset", ["tiny", "tiny-baseline", "longva"])
def test_the_command_that_follows_align_can_be_run(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tv.runs, "draw_curve", lambda *a: None)
    cfg = tv.resolve(tv.Config(**tv.PRESETS[preset], stage="align", weights=tmp_path, tower=tmp_path))
    tv.runs.print_end(cfg.out, tv.runs.command_after_vision(cfg.stage, cfg.system, cfg.tiny))
    _, _, typed = capsys.readouterr().out.rpartition("train_vision.py ")
    after = tv.resolve(flags.parse(tv.Config, tv.PRESETS, "tiny", typed.split()))
    assert after.stage == "sft" and after.weights == cfg.out / "model"
    tv.check(replace(after, weights=tmp_path, images=after.images and tmp_path), 1)


@pytest.mark.ranks
def test_a_killed_preference_resumes_to_the_bit(tmp_path):
    """Pairs as a user has them, each about a film that is a folder of frames."""
    written = []
    for i in range(6):
        (frames,), dialogues = synthetic.preference(1, i, 3)
        (tmp_path / f"film-{i}").mkdir()
        for j, frame in enumerate(frames):
            frame.save(tmp_path / f"film-{i}" / f"{j}.png")
        prompt, chosen, rejected = dialogues[0][0][1], dialogues[0][1][1], dialogues[1][1][1]
        written.append({"id": i, "video": f"film-{i}", "prompt": prompt, "chosen": chosen, "rejected": rejected})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, written)))
    flags = "--stage dpo --device cpu --frames 2 --steps 5 --batch 4 --save-every 1".split()
    flags += ["--weights", TINY / "longva", "--data", tmp_path / "pairs.jsonl", "--images", tmp_path]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert here("train_vision.py", *flags, "--out", straight) == 0
    assert "model:" in kill_and_resume("train_vision.py", flags, killed, 1)
    assert_same_run(straight, killed)
    assert (straight / "reference.safetensors").read_bytes() == (killed / "reference.safetensors").read_bytes()


@pytest.mark.ranks
@pytest.mark.slow
def test_a_killed_ring_resumes_to_the_bit(tmp_path):
    flags = "--stage sft --device cpu --ring 2 --steps 5 --batch 4 --save-every 1".split()
    flags += ["--weights", TINY / "longva"]
    ranks.Job("train_vision.py", tmp_path / "straight", *flags, hook=score_few).end()
    kill_and_resume("train_vision.py", flags, tmp_path / "killed", 2)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


# ---- both stages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--out", "x"], ["--weights", TINY / "extended"], ["--preset", "longva"]])
def test_both_stages_are_the_miniature_s(flags, capsys):
    assert here("train_vision.py", "--stage", "both", *flags) == 2
    assert "--stage both is for the miniature" in capsys.readouterr().err


def test_a_stage_ends_with_its_held_out_score(tmp_path, monkeypatch, capsys):
    """The shipped model reaches what sft should, and an untrained projector does not reach what align should."""
    monkeypatch.setattr(llava, "HELD_OUT", 32)
    cfg = settings(out=tmp_path / "sft", steps=1, lr=0.0, tower_lr=0.0, batch=16, max_len=256)
    tv.train(cfg, ALONE)
    good = capsys.readouterr().out
    tv.train(settings("align", "extended", tower=TINY / "tower", out=tmp_path / "a", steps=1, max_len=256), ALONE)
    bad = capsys.readouterr().out
    assert "held-out: loss" in good and "held-out: loss" in bad
    assert "WARNING" not in good and "WARNING" in bad
