"""data/benchmarks.py without lmms-eval, which has an environment of its own: tests/eval.sh runs the whole."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import longva
from data import benchmarks, chat, synthetic
from data.tiny.benchmark import make, utils
from tests import ranks

STAR, HOUSE, KEY = QUESTIONS = [f"Which number is on the {thing}?" for thing in ("star", "house", "key")]
WANTED = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def model():
    return benchmarks.LongVA(str(chat.TINY_MODEL), 8, "cpu", batch_size=1)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Two pictures and a film of 8 frames as files, and what they show."""
    folder, rng, things = tmp_path_factory.mktemp("shown"), np.random.default_rng(5), "star house key".split()
    pictures = [synthetic.compose_picture(rng, 1, 2, [(thing, "red", n + 3)]) for n, thing in enumerate(things)]
    for thing, picture in zip(things, pictures):
        picture.save(folder / f"{thing}.png")
    needles = [synthetic.compose_picture(rng, 1, 1, [(thing, "blue", n + 6)]) for n, thing in enumerate(things)]
    empty = synthetic.film(1)
    make.write_film(folder / "film.mp4", [needles[n // 2] if n in (0, 2, 4) else next(empty) for n in range(8)])
    return SimpleNamespace(star=pictures[0], house=pictures[1], film=str(folder / "film.mp4"), folder=folder)


def test_pictures_are_asked_about_as_longva_does(model, shown):
    both, files = [shown.star, shown.house], [shown.folder / "star.png", shown.folder / "house.png"]
    said = model.answer(STAR, both[:1], WANTED)
    assert said == longva.answer(model.model, STAR, images=files[:1]) == "3"
    for question in (STAR, HOUSE):
        want = longva.answer(model.model, question, files)
        for marks in ("", "<image> <image>\n", "<image>\n"):  # one mark for two: in front, too
            assert model.answer(marks + question, both, WANTED) == want
    assert isinstance(model.answer(STAR, [], WANTED), str)  # text alone


def test_a_film_is_read_once_for_all_of_its_questions(model, shown, monkeypatch):
    read = []
    monkeypatch.setattr(model, "encode", lambda visual, real=model.encode: read.append(visual) or real(visual))
    model.last = None
    said = [model.answer(question, [shown.film], WANTED) for question in [*QUESTIONS, STAR]]
    assert read == [shown.film] and said[0] == said[3]
    for question, one in zip(QUESTIONS, said):
        assert one == longva.answer(model.model, question, video=shown.film, frames=8)
    model.answer(STAR, [shown.film], {"max_new_tokens": benchmarks.ROOM})  # does not fit behind the film
    model.answer(STAR, [shown.star, shown.star], WANTED)
    assert read == [shown.film, shown.film, shown.star, shown.star]


def ask_together(world, film, expected):
    model = benchmarks.LongVA(str(chat.TINY_MODEL), 8, "cpu")
    model.world = world
    assert [model.answer(question, [film], WANTED) for question in QUESTIONS] == expected


@pytest.mark.ranks
def test_ranks_share_a_films_cache(model, shown):
    ranks.run(2, [ask_together], shown.film, [model.answer(question, [shown.film], WANTED) for question in QUESTIONS])


@pytest.mark.parametrize("wanted, text", [
    ({}, "one two\n\nthree. four"), ({"until": ["\n\n"]}, "one two\n\nthree. four"), ({"until": "two"}, "one"),
    ({"until": [".", "three", ""]}, "one two"), ({"max_new_tokens": 3}, "one"),
])  # fmt: skip
def test_where_an_answer_ends(model, monkeypatch, wanted, text):
    pieces = ["one", " ", "", "two", "\n\n", "three", ".", " four", " "]
    monkeypatch.setattr(longva, "generate", lambda *args: [0] * min(9, args[4]))
    monkeypatch.setattr(model.words, "stream", lambda ids: iter(pieces[: len(ids)]))
    assert model.answer("What?", [], wanted) == text


@pytest.mark.parametrize("wanted, temperature, top_p, penalty", [
    ({}, 0, 1, 1.05), ({"temperature": 0, "top_p": 0.9, "do_sample": False}, 0, 1, 1.05), ({"top_p": 0.9}, 0, 1, 1.05),
    ({"do_sample": False, "temperature": 0.7}, 0, 1, 1.05), ({"temperature": 0.7}, 0.7, 1, 1.05),
    ({"do_sample": True, "top_p": 0.9}, 1, 0.9, 1.05), ({"repetition_penalty": 1}, 0, 1, 1),
])  # fmt: skip
def test_greedy_unless_asked(wanted, temperature, top_p, penalty):
    found = benchmarks.sampling(wanted, 1.05)
    assert (found.temperature, found.top_p, found.repetition_penalty) == (temperature, top_p, penalty)


def generate(model, monkeypatch, visuals):
    """Answers to a task of one question for each of `visuals`, as lmms-eval asks them."""
    monkeypatch.setattr(model, "task_dict", {"toy": {"test": visuals}}, raising=False)
    asked = [(STAR, WANTED, lambda some: some, n, "toy", "test") for n in range(len(visuals))]
    return model.generate_until([SimpleNamespace(args=args) for args in asked])


def test_answers_come_one_by_one_and_a_broken_file_costs_one(model, shown, monkeypatch, capsys, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    answers = generate(model, monkeypatch, [[shown.star], [str(tmp_path / "bad.mp4")], None])
    assert next(answers) == "3" and next(answers) == ""
    said = capsys.readouterr().err
    assert f"toy, question 1 has no answer and counts as wrong: {tmp_path}/bad.mp4: not a video" in said
    assert len(list(answers)) == 1


@pytest.mark.parametrize("visual, message", [("bad.mp4", "question 0: bad.mp4: no such video"), ("star", "for videos")])
def test_together_a_broken_file_or_a_picture_ends_the_run(model, shown, monkeypatch, capsys, visual, message):
    monkeypatch.setattr(model, "torchrun", {"RANK": "0"})
    monkeypatch.setattr(model, "exchange", json.loads)
    with pytest.raises(SystemExit) as exit:
        next(generate(model, monkeypatch, [[getattr(shown, visual, visual)]]))
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_flags_of_lmms_eval_pass_through():
    ours, theirs = benchmarks.split("--limit 8 --tasks a,b --together -n 2 --frames=4 --gen_kwargs top_p=1 -x".split())
    assert ours == "--tasks a,b --together --frames=4".split()
    assert theirs == "--limit 8 -n 2 --gen_kwargs top_p=1 -x".split()


@pytest.mark.parametrize("change, message", [
    ({}, "not installed"), ({"frames": 0}, "--frames 0"), ({"weights": chat.TINY_MODEL.parent / "base"}, "cannot see"),
])  # fmt: skip
def test_mistakes(monkeypatch, change, message):
    monkeypatch.setattr(benchmarks, "lmms", str if change else object)
    with pytest.raises(ValueError, match=message):
        benchmarks.main(benchmarks.Config(**change), [])


# ---- the miniature's benchmark -------------------------------------------------------------------


def test_the_miniatures_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "KINDS", {"picture_number": 1, "picture_colour": 1, "two_pictures": 1})
    monkeypatch.setattr(make, "CHOICES", {"film_choice": 1})
    make.main(make.Config(out=tmp_path))
    docs = json.loads((tmp_path / "questions.json").read_text())
    assert [doc["kind"] for doc in docs] == ["picture_number", "picture_colour", "two_pictures", "film_choice"]
    assert [len(utils.doc_to_visual(doc)) for doc in docs] == [1, 1, 2, 1]
    assert [round(1 / doc["chance"]) for doc in docs] == [10, 8, 10, 4]
    *_, film = docs
    assert film["answer"] in film["choices"] and len(set(film["choices"])) == 4
    choices, question = utils.doc_to_text(film).split("\n")
    assert choices.split() == film["choices"] and question == film["question"]
    assert question == utils.doc_to_text(film | {"choices": []})
    assert utils.process_results(film, [film["answer"] + "."])["film_choice"] == 1
    assert utils.process_results(film, ["10"]) == {"accuracy": 0, "film_choice": 0, "chance": 0.25}


def test_nothing_but_running_needs_lmms_eval(monkeypatch, capsys):
    """`--help` works without it, and the commands that people type name tasks and files that exist."""
    monkeypatch.setattr(sys, "argv", ["benchmarks.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(benchmarks.__file__, run_name="__main__")
    assert not exit.value.code and "--together" in capsys.readouterr().out
    assert (Path(make.__file__).parent / "longva_tiny.yaml").is_file()
