"""LLaVA records: what is read, what is refused and how it is said, which pictures may be opened, and the order."""

import json
import os

import pytest
from PIL import Image

from data import chat, llava, synthetic, text
from data.tokenizer import load_tokenizer

SHOWN = {
    "id": "a1",
    "image": "coco/1.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A <image> star."},
    ],
}
TEXT_ONLY = {"id": 7, "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi\u2028there"}]}
SEVERAL = {
    "image": ["coco/1.png", "2.jpg"],  # no id
    "conversations": [
        {"from": "gpt", "value": "Welcome"}, {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "One"},
        {"from": "human", "value": "and <image>?"}, {"from": "gpt", "value": "Two"},
    ],
}  # fmt: skip
GOOD = [SHOWN, TEXT_ONLY, SEVERAL, {**TEXT_ONLY, "image": None}]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    Image.new("RGB", (5, 3), (255, 0, 0)).save(folder / "coco" / "1.png")
    Image.new("RGB", (2, 4)).save(folder / "2.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    return folder


def write(path, records, lines=False):
    written = [json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(written) + "\n" if lines else f"\n [{','.join(written)}]", encoding="utf-8")
    return path


# ---- records ----


@pytest.mark.parametrize("lines", [False, True])
def test_a_list_and_lines_read_alike(tmp_path, lines):
    assert llava.read_records(write(tmp_path / "r.json", GOOD, lines)) == GOOD


def turns(*said, **more):
    return {"id": "x", "conversations": [{"from": who, "value": what} for who, what in said], **more}


FAULTS = [
    ("a string", "no JSON object"),
    ([], "no JSON object"),
    ({"id": "x"}, "no list of turns"),
    ({"id": "x", "conversations": {"from": "human"}}, "no list of turns"),
    ({"id": "x", "conversations": ["hello"]}, "no list of turns"),
    (turns(), "no answer from 'gpt'"),
    (turns(("human", "hello")), "no answer from 'gpt'"),
    (turns(("gpt", "hello"), ("human", "hi")), "no answer from 'gpt'"),
    (turns(("user", "hello"), ("gpt", "hi")), "from 'user', expected 'human' or 'gpt'"),
    (turns((["human"], "hello"), ("gpt", "hi")), r"from \['human'\], expected"),
    (turns(("human", None), ("gpt", "hi")), "'value' is no text"),
    (turns(("human", "hello"), ("gpt", 3)), "'value' is no text"),
    (turns(("human", "<image>"), ("gpt", "hi")), r"1 <image> for 0 picture\(s\)"),
    (turns(("human", "hello"), ("gpt", "<image>"), image="1.png"), r"0 <image> for 1 picture\(s\)"),
    (turns(("human", "<image><image>"), ("gpt", "hi"), image="1.png"), r"2 <image> for 1 picture\(s\)"),
    (turns(("human", "<image>"), ("gpt", "hi"), image=["1.png", "2.png"]), r"1 <image> for 2 picture\(s\)"),
    (turns(("human", "<image>"), ("gpt", "hi"), image={"bytes": "x"}), "no path"),
    (turns(("human", "<image>"), ("gpt", "hi"), image=""), "no path"),
    (turns(("human", "<image>"), ("gpt", "hi"), image=[3]), "no path"),
    (turns(("human", "<image>"), ("gpt", "hi"), image="a\0b"), "no path"),
]


@pytest.mark.parametrize("record, complaint", FAULTS)
@pytest.mark.parametrize("lines", [False, True])
def test_a_bad_record_is_refused_with_its_number(tmp_path, record, complaint, lines):
    called = "'x'" if isinstance(record, dict) else "unknown"
    pattern = rf"r\.json: 1 of 5 records are bad: record 1 \(id {called}\) .*{complaint}"
    with pytest.raises(ValueError, match=pattern):
        llava.read_records(write(tmp_path / "r.json", [SHOWN, record, *GOOD[1:]], lines))


def test_the_first_five_of_many_are_named(tmp_path):
    file = write(tmp_path / "r.json", [{"id": i} if i % 2 else TEXT_ONLY for i in range(20)])
    with pytest.raises(ValueError, match=r"r\.json: 10 of 20") as raised:
        llava.read_records(file)
    named = [i for i in range(20) if f"record {i} (id {i})" in str(raised.value)]
    assert named == [1, 3, 5, 7, 9]


def test_a_bad_line_is_named(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(SHOWN) + "\n" + json.dumps(TEXT_ONLY)[:-5] + "\n")
    with pytest.raises(ValueError, match=r"r\.jsonl: 1 of 2 .* record 1 \(id unknown\) is no JSON object"):
        llava.read_records(file)


@pytest.mark.parametrize("content, complaint", [
    (None, "No such file"),
    (json.dumps(GOOD)[:-9].encode(), "is not a LLaVA file"),
    (b"\xff\xfe[]", "is not a LLaVA file"),
    (b"[" * 10**5, "is not a LLaVA file"),
    (b"[]", "holds no record"),
    (b"", "1 of 1 records are bad"),
])  # fmt: skip
def test_what_is_no_file_of_records(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"r\.json.*{complaint}"):
        llava.read_records(tmp_path / "r.json")


# ---- samples ----


def test_a_sample_is_pictures_and_turns(images):
    pictures, said = llava.sample(SHOWN, images)
    assert [(p.mode, p.size, p.getpixel((0, 0))) for p in pictures] == [("RGB", (5, 3), (255, 0, 0))]
    assert said == [("user", "<image>\nWhat is this?"), ("assistant", "A <image> star.")]
    pictures, said = llava.sample(SEVERAL, str(images))
    assert [p.size for p in pictures] == [(5, 3), (2, 4)]
    assert [role for role, _ in said] == ["assistant", "user", "assistant", "user", "assistant"]
    assert llava.sample(TEXT_ONLY, None) == ([], [("user", "Hello"), ("assistant", "Hi\u2028there")])


def test_every_checked_record_becomes_a_chat(images):
    words = load_tokenizer(synthetic.TOKENIZER)
    for record in GOOD:
        pictures, said = llava.sample(record, images)
        ids, labels = chat.example(words, said, [2] * len(pictures))
        assert ids.count(chat.IMAGE) == 2 * len(pictures) and set(labels) != {chat.IGNORE}


def test_pictures_stay_inside_the_folder(images):
    os.symlink(images.parent / "secret.png", images / "link.png")
    os.symlink(images.parent, images / "up")
    (images.parent / "images2").mkdir()
    Image.new("RGB", (9, 9)).save(images.parent / "images2" / "1.png")
    out = [
        "../secret.png",
        "coco/../../secret.png",
        str(images.parent / "secret.png"),
        "link.png",
        "up/secret.png",
        "../images2/1.png",
    ]
    for path in out:
        with pytest.raises(ValueError, match=r"record 'a1' shows .* is not inside .*images"):
            llava.sample({**SHOWN, "image": path}, images)
    os.symlink(images, images.parent / "other name")
    for path in ("coco/1.png", "coco/../coco/1.png", str(images / "coco" / "1.png")):
        assert llava.sample({**SHOWN, "image": path}, images.parent / "other name")[0][0].size == (5, 3)


def test_missing_and_broken_pictures_are_named(images):
    (images / "cut.png").write_bytes((images / "coco" / "1.png").read_bytes()[:40])
    os.mkfifo(images / "pipe.png")  # would block for ever if it were opened
    for path, complaint in (
        ("none.png", "no such picture"),
        ("cut.png", "cannot be read"),
        ("coco", "no such"),
        ("pipe.png", "no such"),
    ):
        with pytest.raises(ValueError, match=rf"record 'a1' shows {path}: .*{complaint}"):
            llava.sample({**SHOWN, "image": path}, images)


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_a_missing_folder_is_named(folder):
    with pytest.raises(ValueError, match=rf"record 'a1' shows coco/1\.png, but {folder} is no folder; give --images"):
        llava.sample(SHOWN, folder)


# ---- order ----


def test_every_record_once_per_epoch():
    records = list(range(10))
    drawn = [r for step in range(12) for r in llava.pick(records, 5, step, 5)]
    epochs = [drawn[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == records for epoch in epochs) and len({tuple(e) for e in epochs}) == 6
    assert drawn != [r for step in range(12) for r in llava.pick(records, 6, step, 5)]


@pytest.mark.parametrize("batch", [1, 3, 4, 25])
def test_a_step_can_be_made_alone(batch):
    """Nothing but the number of the step is needed, in the first epoch and in later ones, and no record is lost."""
    records = list(range(10))
    straight = [llava.pick(records, 5, step, batch) for step in range(40)]
    for step in (39, 11, 2):
        text.permutation.cache_clear()
        assert llava.pick(records, 5, step, batch) == straight[step]
    drawn = [r for records_of_step in straight for r in records_of_step]
    assert all(sorted(drawn[i : i + 10]) == records for i in range(0, 40 * batch // 10 * 10, 10))


def test_the_training_script_reads_it(tmp_path, images):
    import train_vision

    file = write(tmp_path / "r.json", GOOD)
    cfg = train_vision.Config(stage="sft", data=str(file), images=images, batch=2, seed=1)
    samples = train_vision.make_samples(cfg, slice(None))
    seen = [said for step in (2, 3) for _, said in samples(step)]  # the second epoch
    parts = [train_vision.make_samples(cfg, slice(rank, None, 2))(2) for rank in range(2)]
    assert [said for part in parts for _, said in part] == [said for _, said in samples(2)]
    assert sorted(seen) == sorted(llava.sample(r, images)[1] for r in GOOD)
    assert [len(pictures) for pictures, _ in samples(3)] == [len(pictures) for pictures, _ in samples(3)]
