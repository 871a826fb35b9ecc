"""The needle test: cells equal one forward pass per probe, a killed grid goes on, mistakes get one sentence."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import longva
import unires
import vniah
from data import chat, needles, parameters, synthetic, tokenizer, video, weights

torch.set_num_threads(1)
EYE = clip.ClipConfig(16, 32, 2, 2, 8, synthetic.SIDE)


def lm_config(words):
    return longva.LMConfig(words.size, 32, 48, 2, 4, 2, rope_theta=1e4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random language model and a random LongVA; large weights, so that answers differ."""
    at, words = tmp_path_factory.mktemp("models"), tokenizer.load_tokenizer(synthetic.TOKENIZER)
    for name, model in {
        "text": longva.LM(lm_config(words)),
        "sees": longva.LongVA(longva.LongVAConfig(lm_config(words), EYE, "unires", "floor")),
    }.items():
        stream = ((n, 20 * t if t.ndim > 1 and "vision" not in n else t) for n, t in parameters.fresh(model, 0))
        weights.copy_tokenizer(synthetic.TOKENIZER, at / name)
        weights.write(at / name, stream, longva.to_dict(model.config))
    return at


@pytest.fixture
def cfg(tmp_path, folders):
    return vniah.Config(
        weights=folders / "sees",
        out=tmp_path / "out",
        frames=(3, 6),
        depths=(0.0, 0.5, 1.0),
        needle_count=5,
        number_count=5,
        device="cpu",
    )


def write_needles(folder, answers=("7", "12", "red", "3")):
    """Needles whose questions and answers differ in length."""
    rng = np.random.default_rng(0)
    made = [
        needles.Needle(
            f"n{i}", synthetic.photograph(rng, 1, 1, synthetic.cast(rng, 1)), "Which number?" + " star" * i, answer
        )
        for i, answer in enumerate(answers)
    ]
    needles.write_needles(folder, made)
    return made


def naive(cfg, panel, frames, depth):
    """The slow way: for each needle the whole sequence in one pass, no cache, no batch."""
    model, words = longva.load(panel.folder, "cpu"), tokenizer.load_tokenizer(panel.folder)
    hidden, signs = vniah.pick_needles(cfg, panel)
    film = list(vniah.open_film(cfg, panel, frames))
    for i, sign in enumerate(signs[:frames]):
        film[int((i + 0.5) * frames / len(signs[:frames]))] = sign.picture
    found, (pre, post) = [], chat.template_ids(words)
    for needle in hidden:
        pictures = list(film)
        if panel.needle:
            pictures.insert(int(depth * frames), needle.picture)
        pixels = unires.frames(pictures, synthetic.SIDE, "pad")
        seen = model.see(pixels, [unires.Layout(1, len(pictures))])
        answer = words.encode(needle.answer)
        ids = [*pre, *[chat.IMAGE] * len(seen), *words.encode("\n" + needle.question), *post, *answer]
        h = model.model(model.embed(torch.tensor([ids]), seen), torch.arange(len(ids)))
        best = model.logits(h[:, -len(answer) - 1 : -1]).argmax(-1)[0]
        found.append(best.tolist() == answer)
    return found


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("needle", [True, False])
def test_cells_equal_one_pass_per_probe(cfg, tmp_path, own, needle, monkeypatch):
    if own:
        write_needles(tmp_path / "needles")
        cfg = replace(cfg, needles=tmp_path / "needles")
    panel = vniah.Panel("x", cfg.weights, needle=needle)
    model, words = longva.load(panel.folder, "cpu"), tokenizer.load_tokenizer(panel.folder)
    # A random model is right by luck alone, so the likeliest ids themselves are compared.
    seen = []
    monkeypatch.setattr(longva.LM, "logits", lambda self, h: seen.append(x := self.lm_head(h).float()) or x)
    film = vniah.Film(cfg, panel, model, words)
    for frames in (6, 3):
        for depth in (0.0, 0.4, 1.0):
            seen.clear()
            cell = film.cell(frames, depth)
            fast = sorted(row.flatten().tolist() for x in seen for row in x)
            seen.clear()
            assert cell == naive(cfg, panel, frames, depth)
            slow = sorted(row.flatten().tolist() for x in seen for row in x)
            for a, b in zip(fast, slow, strict=True):
                torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-4)


def test_story_cells_equal_one_pass_per_probe(cfg, folders):
    cfg = replace(cfg, task="text", weights=folders / "text", context=(40, 90), digits=2)
    model, words = longva.load(cfg.weights, "cpu"), tokenizer.load_tokenizer(cfg.weights)
    story = vniah.Story(cfg, vniah.Panel("x", cfg.weights, distractors=3), model, words)
    probes = story.probes(90, 0.5)
    slow = []
    for ids, answer in probes:
        whole = torch.tensor([ids + answer])
        h = model.model(model.embed(whole), torch.arange(whole.shape[1]))
        slow.append(model.logits(h[:, -len(answer) - 1 : -1]).argmax(-1)[0].tolist() == answer)
    assert story.cell(90, 0.5) == slow and len(slow) == 5
    assert probes != story.probes(90, 0.0) and probes == story.probes(90, 0.5)


def test_whole_run_resumes_and_reports(cfg, capsys):
    vniah.main(cfg)
    first = capsys.readouterr().out
    assert "95 % interval" in first and "heatmap.png" in first and "no needle" in first
    result = json.loads((cfg.out / "results.json").read_text())
    assert len(result["cells"]) == 2 * 3 + 2
    picture = Image.open(cfg.out / "heatmap.png")
    assert min(picture.size) > 200
    file = cfg.out / vniah.CELLS
    whole = file.read_text()
    file.write_text("".join(whole.splitlines(keepends=True)[:3]) + '{"panel": "se')  # killed while writing
    vniah.main(cfg)
    assert capsys.readouterr().out == first and file.read_text() == whole


def test_finished_cells_are_not_probed_again(cfg, monkeypatch):
    vniah.main(cfg)
    monkeypatch.setattr(longva, "load", lambda *a: pytest.fail("loaded a model for nothing"))
    vniah.main(cfg)


def test_a_film_file_is_a_haystack(cfg, tmp_path):
    folder = tmp_path / "film"
    folder.mkdir()
    for i, frame in zip(range(6), synthetic.film(1)):
        frame.save(folder / f"{i}.png")
    write_needles(tmp_path / "needles")
    cfg = replace(cfg, haystack=str(folder), needles=tmp_path / "needles")
    vniah.main(cfg)
    assert len(list(video.frames(folder))) == 6


@pytest.mark.parametrize("change, complaint", [
    ({"frames": (3, 600), "haystack": "{film}"}, "longest haystack"),
    ({"weights": "{text}"}, "cannot see"),
    ({"depths": (0.5, 1.5)}, "1.5"),
    ({"haystack": "nowhere.mp4"}, "nowhere.mp4"),
    ({"needles": "{film}"}, "questions.json"),
])  # fmt: skip
def test_mistakes_get_one_sentence(cfg, folders, tmp_path, change, complaint):
    film = tmp_path / "film"
    film.mkdir()
    next(synthetic.film(0)).save(film / "0.png")
    fill = {"{film}": film, "{text}": folders / "text"}
    change = {name: fill.get(value, value) for name, value in change.items()}
    if "haystack" in change:
        change["haystack"] = str(change["haystack"])
    with pytest.raises(ValueError, match=complaint):
        vniah.main(replace(cfg, **change))


def test_training_never_sees_what_is_tested():
    """Needles, film and story come from streams of random numbers that no training text or picture uses."""
    tested = {n.picture.tobytes() for seed in (7, 1007) for n in synthetic.draw_needles(seed, 24, 3)[0]}
    trained = {p.tobytes() for step in range(3) for p in synthetic.captioned_grids(42, step, 100)[0]}
    assert not tested & trained and len(tested) == 48


def test_table_and_rate():
    panel = vniah.Panel("p", None)
    cells = {("p", 8, 0.0): [True, False], ("p", 8, 1.0): [True, True], ("p", 16, 0.0): [False, False]}
    assert vniah.rate(cells, panel) == (3, 6) and vniah.rate(cells, panel, 8) == (3, 4)
    assert vniah.rate(cells, panel, depth=0.0) == (1, 4)
    low, high = needles.wilson(3, 6)
    assert f"{low:.3f} to {high:.3f}" in vniah.table(cells, [panel], (8, 16), "frames")
