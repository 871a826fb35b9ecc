"""LLaVA records: what is read, what is refused and how it is said, which pictures may be opened, and the order."""

import codecs
import json
import os
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from data import llava, text
from tests.test_data_video import film, regular


def turns(*said, **more):
    return {"id": "x", "conversations": [{"from": who, "value": what} for who, what in said], **more}


def asked(question, **more):
    return turns(("human", question), ("gpt", "hi"), **more)


SHOWN = turns(("human", "<image>\nWhat is this?"), ("gpt", "A <image> star."), id="a1", image="coco/1.png")
TEXT_ONLY = turns(("human", "Hello"), ("gpt", "Hi\u2028there"), id=7)
SEVERAL = turns(
    ("gpt", "Welcome"), ("human", "<image>"), ("gpt", "One"), ("human", "and <image>?"), ("gpt", "Two"),
    image=["coco/1.png", "2.jpg"],
)  # fmt: skip
del SEVERAL["id"]
GOOD = [SHOWN, TEXT_ONLY, SEVERAL, {**TEXT_ONLY, "image": None}]
PAIR = {"id": "p", "video": "film", "prompt": "<video>\n What? ", "chosen": "A star.", "rejected": "A moon."}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    Image.new("RGB", (5, 3), (255, 0, 0)).save(folder / "coco" / "1.png")
    Image.new("RGB", (2, 4)).save(folder / "2.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (folder / "film").mkdir()
    for i in range(12):
        Image.new("RGB", (8, 6), (20 * i, 0, 0)).save(folder / "film" / f"{i}.png")
    return folder


def write(path, records, lines=False):
    written = [json.dumps(r) for r in records]
    path.write_text("\n".join(written) + "\n" if lines else f"\n [{','.join(written)}]", encoding="utf-8")
    return path


# ---- records -------------------------------------------------------------------------------------


ODD = [  # whatever a cut may fall into
    {"id": "\u00e9\u20ac\U0001f600" * 3, "n": [1.5e-3, True, None, {"a": "\\\"]},{["}]},
    {"id": "\U0001f600 \\ud83d \" \\\\ \u00fc"}, {"id": ""}, {"id": "]" * 40, "deep": [[[[]]]]},
]  # fmt: skip


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 10**6])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("before, between, after", [
    (b" \n[ ", b",", b"\n ]\n"), (b" \n[ ", b" ,\r\n\t", b"\n ]\n"), (b"[", b", ", b"]"),  # a list
    (b"", b"\n", b"\n"), (b"", b"\r\n", b"\r\n"), (b"\n", b"\n\n  \n", b"\n\n  \n"), (b"", b"\n", b""),  # lines
])  # fmt: skip
def test_spans_are_exact_wherever_blocks_cut(tmp_path, monkeypatch, block, plain, before, between, after):
    """Escapes, brackets in strings and characters of several bytes across block borders; spans in bytes."""
    monkeypatch.setattr(llava, "BLOCK_BYTES", block)
    written = [json.dumps(r, ensure_ascii=plain).encode() for r in ODD]
    content, file = before + between.join(written) + after, tmp_path / "r.json"
    file.write_bytes(content)
    with open(file, "rb") as opened:
        found = list(llava.iter_records(opened))
    assert [record for *_, record in found] == ODD
    assert [content[start:stop].strip() for start, stop, _ in found] == written


@pytest.mark.parametrize("lines", [False, True])
def test_a_large_file_is_never_held(tmp_path, monkeypatch, lines):
    """Four times the records need no more memory, of which a fraction of the file's size is enough."""
    monkeypatch.setattr(llava, "BLOCK_BYTES", 2**14)
    monkeypatch.setattr(llava, "RECORDS_AT_ONCE", 16)
    peaks, file = [], tmp_path / "r.json"
    for count in (150, 600):
        write(file, [asked("What? " * 50 + "\u00e4" * 300, id=i) for i in range(count)], lines)
        tracemalloc.start()
        records = llava.open_records(file)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(records) == count and [records[i]["id"] for i in (0, 99, count - 1)] == [0, 99, count - 1]
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < file.stat().st_size / 3, (peaks, file.stat().st_size)


FAULTS = [
    (None, "no JSON object"), ([], "no JSON object"),
    ({"id": "x", "conversations": {"from": "human"}}, "no list of turns"),
    ({"id": "x", "conversations": ["hello"]}, "no list of turns"),
    (turns(), "no answer from 'gpt'"), (turns(("gpt", "hello"), ("human", "hi")), "no answer from 'gpt'"),
    (turns(("user", "hello"), ("gpt", "hi")), "from 'user', expected 'human' or 'gpt'"),
    (turns((["human"], "hello"), ("gpt", "hi")), r"from \['human'\], expected"),
    (turns(("human", "hello"), ("gpt", 3)), "'value' is no text"),
    (turns(("human", "hello"), ("gpt", "<image>"), image="1.png"), r"0 <image> for 1 picture\(s\)"),
    (asked("<image>"), r"1 <image> for 0 picture\(s\)"),
    (asked("<image>", image=["1.png", "2.png"]), r"1 <image> for 2 picture\(s\)"),
    (asked("<video>", image="1.png"), r"1 <image> or <video> for 1 picture\(s\)"),
    (asked("<video><image>", video=["1", "2"]), r"2 <image> or <video> for 2 picture\(s\)"),
    (asked("<image>", image={"bytes": "x"}), "no path"), (asked("<image>", image=[3]), "no path"),
    (asked("<image>", image="a\0b"), "no path"), (asked("<image>", image="\ud800.png"), "no path"),
    (asked("<image>", videos=[""]), "no path, and no list of paths, under 'videos'"),
    (asked("half a \ud800"), "half of a surrogate pair"),
    ({"id": "x", "prompt": "?", "chosen": "a", "rejected": "\udfff"}, "half of a surrogate pair"),
    ({"id": "x", "prompt": "?", "chosen": "a"}, "'rejected' that is no text"),
    ({"id": "x", "chosen": "a", "rejected": "b"}, "'prompt' that is no text"),
    ({"id": "x", "prompt": "?", "chosen": "a", "rejected": "a"}, "prefers an answer to itself"),
]  # fmt: skip


@pytest.mark.parametrize("record, complaint", FAULTS)
def test_a_bad_record_is_refused_with_its_number(tmp_path, record, complaint):
    called = "'x'" if isinstance(record, dict) else "unknown"
    with pytest.raises(ValueError, match=rf"r\.json: 1 of 5 .* bad: record 1 \(id {called}\) .*{complaint}"):
        llava.open_records(write(tmp_path / "r.json", [SHOWN, record, *GOOD[1:]]))


@pytest.mark.parametrize("stage, record, length", [
    ("align", asked("<image>", image="2.jpg"), 1 + 3 + 2 * 4),  # two words are three tokens
    ("sft", {**SEVERAL, "video": None}, 1 + 8 + 5 * 3 + 2 * 4), ("dpo", PAIR, 1 + 5 + 99),
])  # fmt: skip
def test_how_long_a_stage_s_samples_are(images, stage, record, length):
    assert llava.measure(stage, images, lambda width, height: width * height, 99, record) == length


@pytest.mark.parametrize("stage, record, complaint", [
    ("dpo", asked("?"), "no 'chosen' and 'rejected' answer"), ("sft", PAIR, "a pair of answers; use --stage dpo"),
    ("align", SEVERAL, "has 5 turns, but --stage align takes a question and a caption"),
])  # fmt: skip
def test_what_a_stage_cannot_use(stage, record, complaint):
    with pytest.raises(ValueError, match=complaint):
        llava.measure(stage, None, lambda width, height: 1, 99, record)


def test_the_first_of_many_are_named(tmp_path):
    """As many as one line has room for."""
    file = write(tmp_path / "r.json", [{"id": i} if i % 2 else TEXT_ONLY for i in range(20)])
    with pytest.raises(ValueError, match=r"r\.json: 10 of 20") as raised:
        llava.open_records(file)
    named = [i for i in range(20) if f"record {i} (id {i})" in str(raised.value)]
    assert len(named) > 1 and named == [1, 3, 5, 7, 9][: len(named)] and len(str(raised.value)) <= 300


@pytest.mark.parametrize("key", ["image", "video"])
@pytest.mark.parametrize("letters", [300, 10**5])
def test_a_name_that_is_too_long_costs_one_record(tmp_path, images, key, letters):
    """The system refuses such a name with an OSError of its own; the sentence does not repeat all of it."""
    long = asked("<image>", **{key: "n" * letters}, id="x" * letters)
    file = write(tmp_path / "r.json", [TEXT_ONLY, long])
    records = llava.open_records(file, lambda record: len(llava.sizes(record, images)) + 1, 0.5)
    assert len(records) == 1 and len(records.bad[0][2]) <= 200 and records.bad[0][2].startswith("shows nnn")
    with pytest.raises(ValueError, match=r"1 of 2 records are bad: record 1 \(id 'xxx") as raised:
        llava.open_records(file, lambda record: len(llava.sizes(record, images)) + 1)
    assert len(str(raised.value)) <= 300
    with pytest.raises(ValueError, match=r"^shows nnn.{,191}$"):
        llava.read_sample(long, images)


@pytest.mark.parametrize("content, complaint", [
    (None, "no such file"), (b"", "holds no record"), (b"[]", "holds no record"),
    (json.dumps(GOOD)[:-9].encode(), "is not a LLaVA file"), (json.dumps(GOOD)[:-1].encode(), "is not a LLaVA file"),
    (b'[{"id": "\xff"}]', "is not a LLaVA file"), (b"[" * 10**5, "is not a LLaVA file"),
    (b"\xff\xfe[]", "record 0 .id unknown. is no JSON object"),
    (b'{"id": 1}\n{"id": ', "2 of 2 .* record 1 .id unknown. is no JSON object"),
])  # fmt: skip
def test_what_is_no_file_of_records(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"r\.json.*{complaint}"):
        llava.open_records(tmp_path / "r.json")


@pytest.mark.parametrize("lines", [False, True])
def test_some_may_be_bad(tmp_path, lines):
    """Up to the share that is allowed, bad ones are left out and listed; `measure` may refuse as well."""
    given = [*GOOD, {"id": "none"}, *GOOD, {**TEXT_ONLY, "id": 9}]
    file = write(tmp_path / "r.json", given, lines)

    def measure(record):
        if record.get("id") == 9:
            raise ValueError("is too small")
        return 2 + len(record["conversations"])

    records = llava.open_records(file, measure, max_skip_fraction=0.2)
    assert [records[i] for i in range(len(records))] == GOOD + GOOD and records.count == 10
    assert records.tokens.tolist() == [4, 4, 7, 4] * 2 and records.numbers.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert records.bad == [(4, "none", "has no list of turns 'conversations'"), (9, 9, "is too small")]
    with pytest.raises(ValueError, match=r"2 of 10 .* bad, more than --max-skip-fraction 0.19 allows: record 4 .* 9 "):
        llava.open_records(file, measure, max_skip_fraction=0.19)


@pytest.mark.parametrize("lines", [False, True])
def test_marks_and_nulls_that_other_programs_write(tmp_path, lines):
    """A byte order mark; tables of all kinds of records, which are null where a field is another kind's."""
    filled = [record | {"prompt": None, "chosen": None, "rejected": None} for record in GOOD]
    file = write(tmp_path / "r.json", filled, lines)
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    records = llava.open_records(file)
    assert [records[i] for i in range(len(records))] == filled
    assert [llava.validate(one) for one in filled] == [llava.validate(one) for one in GOOD]


def test_ranks_divide_the_work(tmp_path):
    """Each measures its half, both know the sum, and each tells what it found itself, unless the run stops."""
    given = [*GOOD, {"id": "none"}, {"id": "nor here"}]
    file, measured, halves = write(tmp_path / "r.json", given), [[], []], []

    def measure(rank):
        return lambda record: measured[rank].append(record) or 1 + len(record["conversations"])

    for rank in range(2):  # first what each has, then what each makes of the sum
        llava.open_records(file, measure(rank), 1.0, rank, 2, lambda mine: halves.append(mine) or mine)
    assert measured == [GOOD[::2], GOOD[1::2]]
    both = [llava.open_records(file, measure(rank), 1.0, rank, 2, lambda mine: sum(halves)) for rank in range(2)]
    alone = llava.open_records(file, measure(0), 1.0)
    for records in both:
        assert np.array_equal(records.spans, alone.spans) and np.array_equal(records.tokens, alone.tokens)
    assert [[i for i, *_ in records.bad] for records in both] == [[4], [5]]
    for rank in range(2):
        with pytest.raises(ValueError, match=r"2 of 6 .*: record 4 \(id 'none'\) has .*; record 5 \(id 'nor here'\)"):
            llava.open_records(file, measure(rank), 0.0, rank, 2, lambda mine: sum(halves))


# ---- samples -------------------------------------------------------------------------------------


def test_a_sample_is_pictures_and_turns(images):
    pictures, (said,) = llava.read_sample(SHOWN, images)
    assert [(p.mode, p.size, p.getpixel((0, 0))) for p in pictures] == [("RGB", (5, 3), (255, 0, 0))]
    assert said == [("user", "<image>\nWhat is this?"), ("assistant", "A <image> star.")]
    pictures, (said,) = llava.read_sample(SEVERAL, str(images))
    assert [p.size for p in pictures] == [(5, 3), (2, 4)]
    assert [role for role, _ in said] == ["assistant", "user", "assistant", "user", "assistant"]
    assert llava.read_sample(TEXT_ONLY, None) == ([], [[("user", "Hello"), ("assistant", "Hi\u2028there")]])
    noisy = asked("Why? QA_GT_caption_based_noisy")  # a mark that the release removes
    assert llava.read_sample(noisy, images)[1] == [[("user", "Why? "), ("assistant", "hi")]]


@pytest.mark.parametrize("mark", ["<video>", "<image>"])
def test_videos_are_files_or_folders_of_frames(images, mark):
    """A film's 12 frames differ; both kinds give so many of them, evenly spread; of 12, the thirteenth comes again."""
    film(images / "a.mp4", regular(12))
    for path in ("film", "a.mp4"):
        record = asked(f"{mark}\nWhat?", video=path)
        (frames,), (said,) = llava.read_sample(record, images, frames=4)
        assert len(frames) == 4 and said == [("user", "<image>\nWhat?"), ("assistant", "hi")]
        assert llava.sizes(record, images) == [None]
        if path == "film":
            assert [frame.getpixel((0, 0))[0] // 20 for frame in frames] == [0, 3, 7, 11]
        (frames,), _ = llava.read_sample(record, images, frames=13)  # as in the release
        assert len(frames) == 13 and len({frame.tobytes() for frame in frames}) == 12


def test_pictures_and_videos_come_in_the_text_s_order(images):
    record = turns(
        ("human", "<image> then <video>"), ("gpt", "hi"), ("human", "<video> <image>?"), ("gpt", "<video>"),
        images=["coco/1.png", "2.jpg"], videos=["film", "film"],
    )  # fmt: skip
    shown, (said,) = llava.validate(record)
    assert shown == [("image", "coco/1.png"), ("video", "film"), ("video", "film"), ("image", "2.jpg")]
    assert [text for _, text in said] == ["<image> then <image>", "hi", "<image> <image>?", "<video>"]
    assert llava.sizes(record, images) == [(5, 3), None, None, (2, 4)]
    read, _ = llava.read_sample(record, images, frames=2)
    assert [len(one) if isinstance(one, list) else one.size for one in read] == [(5, 3), 2, 2, (2, 4)]
    alike = asked("<image><image><image>", image=["1", "2"], video="3")
    assert llava.validate(alike)[0] == [("image", "1"), ("image", "2"), ("video", "3")]


@pytest.mark.parametrize("prompt", ["<video>\n What? ", "What?", "<image>\nWhat?", "What?\n<video>"])
def test_a_pair_is_one_question_and_two_answers(images, prompt):
    """The film stands once in front of the question, wherever and however often the prompt names it (release)."""
    (frames,), dialogues = llava.read_sample({**PAIR, "prompt": prompt}, images, frames=10)
    assert len(frames) == 10
    assert dialogues == [[("user", "<image>\nWhat?"), ("assistant", said)] for said in ("A star.", "A moon.")]
    text_only = {key: value for key, value in PAIR.items() if key != "video"}
    assert llava.read_sample(text_only, None)[0] == [] and llava.validate(text_only)[1][0][0] == ("user", "What?")


@pytest.mark.parametrize("path", [
    "../secret.png", "coco/../../secret.png", "{above}/secret.png", "link.png", "up/secret.png", "../images2/1.png",
])  # fmt: skip
def test_pictures_outside_the_folder_are_refused(images, path):
    os.symlink(images.parent / "secret.png", images / "link.png")
    os.symlink(images.parent, images / "up")
    (images.parent / "images2").mkdir()
    Image.new("RGB", (9, 9)).save(images.parent / "images2" / "1.png")
    path = path.format(above=images.parent)
    for read in (llava.read_sample, llava.sizes):
        for record in ({**SHOWN, "image": path}, {**PAIR, "video": path}):
            with pytest.raises(ValueError, match=r"^shows .* is not inside .*images; expected a path in it"):
                read(record, images)


@pytest.mark.parametrize("path", ["coco/1.png", "coco/../coco/1.png", "{images}/coco/1.png"])
def test_pictures_inside_the_folder_are_found(images, path):
    os.symlink(images, images.parent / "other name")
    record = {**SHOWN, "image": path.format(images=images)}
    assert llava.read_sample(record, images.parent / "other name")[0][0].size == (5, 3)
    assert llava.sizes(record, images.parent / "other name") == [(5, 3)]


@pytest.mark.parametrize("record, path, read_complaint, size_complaint", [
    (SHOWN, "none.png", "no such picture", "no such picture"), (PAIR, "none.mp4", "none.mp4", "there is no such video"),
    (SHOWN, "pipe.png", "no such", "no such"),  # would block for ever if it were opened
    (SHOWN, "cut.png", "cannot be read", None), (PAIR, "no.mp4", "no.mp4", None),  # known only when they are read
])  # fmt: skip
def test_missing_and_broken_pictures_and_videos_are_named(images, record, path, read_complaint, size_complaint):
    (images / "cut.png").write_bytes((images / "coco" / "1.png").read_bytes()[:40])
    os.mkfifo(images / "pipe.png")
    (images / "no.mp4").write_text("no film")
    record = {**record, "image" if record is SHOWN else "video": path}
    with pytest.raises(ValueError, match=rf"^shows {path}: .*{read_complaint}"):
        llava.read_sample(record, images)
    if size_complaint:
        with pytest.raises(ValueError, match=rf"^shows {path}: .*{size_complaint}"):
            llava.sizes(record, images)


@pytest.mark.parametrize("folder, why", [(None, "no folder is given"), ("nowhere", "nowhere is no folder")])
def test_a_missing_folder_is_named(folder, why):
    with pytest.raises(ValueError, match=rf"^shows coco/1\.png, but {why}: name as --images"):
        llava.read_sample(SHOWN, folder)


# ---- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 25])
def test_a_step_can_be_made_alone(batch):
    """Nothing but the number of the step is needed, in the first epoch and in later ones, and no record is lost."""
    tokens = np.array([5, 1, 1, 9, 2, 2, 8, 3, 30, 1])
    straight = [llava.batch_indices(tokens, 5, step, batch) for step in range(60)]
    for step in (59, 11, 2):
        text.permutation.cache_clear()
        llava.length_groups.cache_clear()
        assert llava.batch_indices(tokens, 5, step, batch) == straight[step]
    drawn = [r for records_of_step in straight for r in records_of_step]
    assert [drawn.count(r) for r in range(10)] == [6 * batch] * 10  # whole epochs, for each batch
    assert all(len(numbers) == batch for numbers in straight)
    epochs = [drawn[i : i + 10] for i in range(0, len(drawn), 10)]
    assert batch not in (1, 5) or all(sorted(epoch) == [*range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert straight != [llava.batch_indices(tokens, 6, step, batch) for step in range(60)]


@pytest.mark.parametrize("ranks", [4, 8])
def test_a_step_s_records_are_of_like_length(ranks):
    """Padding on lengths like LLaVA's at its batch of 32, up to 4 read at once by each rank, against random order."""
    rng = np.random.default_rng(0)
    visual = np.exp(rng.normal(7.4, 0.6, 20_000)).clip(288, 7056).astype(int) // 144 * 144
    tokens = np.where(rng.random(20_000) < 0.1, 0, visual) + np.exp(rng.normal(4.5, 0.8, 20_000)).astype(int) + 1

    def padding(numbers_of_steps):
        mine = [tokens[numbers[rank::ranks]] for numbers in numbers_of_steps for rank in range(ranks)]
        parts = [lengths[start : start + 4] for lengths in mine for start in range(0, len(lengths), 4)]
        return 1 - sum(part.sum() for part in parts) / sum(len(part) * part.max() for part in parts)

    assert padding(llava.batch_indices(tokens, 1, step, 32) for step in range(200)) < 0.1
    assert padding(text.shuffled(len(tokens), 1, step * 32, 32) for step in range(200)) > 0.3


def test_steps_of_a_group_come_in_no_order_of_length():
    tokens = np.arange(3200) + 1
    first = [tokens[llava.batch_indices(tokens, 1, step, 32)].mean() for step in range(32)]
    assert sorted(first) != first and abs(np.corrcoef(first, range(32))[0, 1]) < 0.5
    assert max(np.ptp(tokens[llava.batch_indices(tokens, 1, step, 32)]) for step in range(32)) < 3200 / 8
