"""The README's pictures: each is drawn, legible where it is shown, and says what the code computes."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

import ring
from data import memory, pictures
from data.config import LMConfig
from data.tiny import chains, transfer


@pytest.mark.parametrize("name", pictures.DRAWN)
def test_is_drawn_and_legible(name):
    figure = pictures.DRAWN[name]()
    figure.canvas.draw()
    inside = figure.bbox
    for text in figure.findobj(Text):
        if text.get_text():
            assert text.get_fontsize() >= pictures.TEXT * 0.72, text
            box = text.get_window_extent()
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, text
    drawn = figure.canvas.get_width_height()
    assert drawn == Image.open(pictures.ASSETS / f"{name}.png").size and drawn[0] == 2 * pictures.WIDTH


def test_the_command_draws_what_is_named(tmp_path, monkeypatch, capsys):
    shipped = Image.open(pictures.ASSETS / "row.png")
    monkeypatch.setattr(pictures, "ASSETS", tmp_path)
    pictures.main(["row"])
    (file,) = tmp_path.iterdir()
    assert file.name == "row.png" and Image.open(file).size == shipped.size
    with pytest.raises(SystemExit):
        pictures.main(["cat"])
    assert "there is no picture cat" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [2, 4])
def test_hops_are_those_of_the_ring(ranks):
    hop = pictures.hops(ranks)
    for rank in range(ranks):
        world = ring.World(rank=rank, ranks=ranks, device=torch.device("cpu"))
        mine = ring.zigzag_index(2 * ranks, world).tolist()
        assert mine == [rank, 2 * ranks - 1 - rank]
        for h in range(ranks):
            theirs = [(rank - h) % ranks, 2 * ranks - 1 - (rank - h) % ranks]
            assert (hop[np.ix_(mine, theirs)] == h).sum() == (3 if h == 0 else 2)
    assert (np.triu(hop, 1) == np.triu(np.full_like(hop, -1), 1)).all() and (np.diag(hop) == 0).all()


def test_memory_is_the_planner_s():
    rows = pictures.training_memory()
    assert rows["no savings"]["logits"] == pytest.approx(28_000 * 152_064 * 8 / 1e9)
    assert rows["loss in chunks"]["parameters, gradients, AdamW"] == pytest.approx(16 * 7.6156e9 / 8 / 1e9, rel=1e-3)
    totals = [sum(terms.values()) for terms in rows.values()]
    assert totals == sorted(totals, reverse=True)
    given = memory.step_terms(memory.Step(LMConfig()))
    assert totals[-1] == pytest.approx(sum(given.values()) / 1e9)


def test_measured_numbers_are_the_tables():
    page = (pictures.ASSETS.parent / "data/tiny/README.md").read_text()
    for task in ("vision", "text"):
        assert chains.table(chains.load(), task) in page
    assert transfer.table(transfer.load()) in page and transfer.shares_table(transfer.load()) in page
