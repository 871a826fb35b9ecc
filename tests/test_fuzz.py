"""Seeded mutations of every file that users bring: a reader returns, or says in one short sentence what is wrong.

Each row of READERS makes sound files in a folder, and names a function that reads them all. A case changes one of the
files, its bytes or a value of its JSON, and calls that function.
"""

import copy
import json
import math
import random
import signal
import traceback
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import longva
import unires
from data import checkpoint, config, llava, niah, results, runs, text, tokenizer, video, weights
from tests import test_data_checkpoint as states
from tests import test_data_tokenizer as tokenizers
from tests.test_data_config import CLIP, GENERATION, LONGVA, NEXT_MISTRAL, QWEN2
from tests.test_data_runs import SETTINGS, fill

ROOT = Path(__file__).parents[1]
TINY, TOKENIZER = ROOT / "data/tiny", ROOT / "data/tiny/tokenizer"
LM = config.LMConfig(300, 16, 24, 1, 2, 1)
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}


# ---- models and what they read -------------------------------------------------------------------


def config_files(folder: Path) -> None:
    for i, raw in enumerate((QWEN2 | YARN, LONGVA, NEXT_MISTRAL, {"vision_config": CLIP, "x": 0})):
        (folder / f"{i}").mkdir()
        (folder / f"{i}" / "config.json").write_text(json.dumps(raw))


def read_configs(folder: Path) -> None:
    for one in folder.iterdir():
        raw = weights.read_config(one)
        if "vision_config" in raw and len(raw) == 2:
            config.ClipConfig.from_dict(raw)
        else:
            found = config.read_config(one)
            config.to_dict(found)
            lm = getattr(found, "lm", found)
            longva.rope(torch.arange(4), min(lm.head_width, 256), lm.rope_theta, lm.rope_scaling, 4)


def generation_file(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))


def read_generation(folder: Path) -> None:
    config.stop_ids(folder)
    logits = torch.tensor([3.0, -2.0, 1e30, 0.0] + [0.5] * 40)
    config.sample(logits, [1, 2], config.read_sampling(folder), torch.Generator().manual_seed(0))


def qwen2_files(folder: Path) -> None:
    weights.copy_tokenizer(TOKENIZER, folder)
    (folder / "added_tokens.json").write_text(json.dumps(tokenizer.load_tokenizer(TOKENIZER).special))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 400}))


def tokenizer_json(folder: Path) -> None:
    vocab = json.loads((TOKENIZER / "vocab.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": tokenizer.QWEN2_WORDS}, "behavior": "Isolated"}
    added = [{"content": name, "id": len(vocab) + i} for i, name in enumerate(tokenizer.QWEN2_SPECIALS)]
    merges = (TOKENIZER / "merges.txt").read_text().splitlines()[1:]
    whole = {"model": {"type": "BPE", "vocab": vocab, "merges": [*merges[:9], *(m.split(" ") for m in merges[9:])]}}
    whole |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}}
    (folder / "tokenizer.json").write_text(json.dumps(whole | {"added_tokens": added, "normalizer": {"type": "NFC"}}))


def sentencepiece_model(folder: Path) -> None:
    tokenizers.train_sentencepiece(folder)
    (folder / "tokenizer.vocab").unlink()


def read_tokenizer(folder: Path) -> None:
    words = tokenizer.load_tokenizer(folder)
    words.decode(words.encode("the red star <|im_end|>\n caf\u00e9 12", special=True))


def model_folder(folder: Path) -> None:
    with torch.device("meta"):
        model = longva.LM(LM)
    weights.write(folder, weights.init_weights(model, 0), config.to_dict(LM), shard_bytes=20_000)


def needle_folder(folder: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    niah.write_needles(folder, [niah.Needle(f"n{i}", picture, f"A. {i}\nB. x", "A", "k") for i in range(3)])
    for file in folder.glob("*.png"):
        file.chmod(0o444)


def read_needles(folder: Path) -> None:
    for needle in niah.read_needles(folder):
        niah.shuffled_options(needle, np.random.default_rng(0))
        f"{needle.question}{needle.answer}{needle.name}{needle.kind}".encode()


def token_files(folder: Path) -> None:
    words, ids = tokenizer.load_tokenizer(TOKENIZER), np.arange(200, dtype=np.uint16)
    for worker in range(2):
        np.save(shard := text.shard_file(folder, worker, 2), ids)
        job = {"tokenizer": text.vocabulary_digest(words), "vocabulary": words.size, "worker": worker}
        runs.write_checked(text.summary_file(shard), {"job": job, "tokens": len(ids), "digest": runs.digest(shard)})


def read_tokens(folder: Path) -> None:
    tokens = text.open_corpus(folder, tokenizer.load_tokenizer(TOKENIZER))
    text.windows(tokens, 16, 2, 0, 0)


# ---- what runs write -----------------------------------------------------------------------------


def run_folder(folder: Path) -> None:
    runs.open_run(folder, SETTINGS)
    fill(folder, 4)


def open_run(folder: Path) -> None:
    runs.LOCKS.clear()
    runs.open_run(folder, SETTINGS)
    runs.resume_log(folder, 3, 0)
    runs.column(folder, "loss")


def saved_states(folder: Path) -> None:
    for step in (1, 2):
        states.save(folder, step, ranks=1)


def load_state(folder: Path) -> None:
    state = states.newest(folder, ranks=1)
    assert state, "a state is not seen"
    checkpoint.restore(state, *states.trained(0), states.copy)


def vniah_folder(folder: Path) -> None:
    results.open_results(folder, SETTINGS)
    log = results.ProbeLog(folder, 0, lambda: None)
    log.note_system("s", {"prompts": {}, "haystack": ["0"]})
    needles = [niah.Needle(f"n{i}", None, "Which?", "7", "k") for i in range(3)]
    log.append([results.probe_line("s", (8, 0.5), needle, 40, True, "7", "7") for needle in needles])
    log.read()
    results.write_results(folder, log, {"s": 8.0})


def go_on_with_vniah(folder: Path) -> None:
    runs.LOCKS.clear()
    results.open_results(folder, SETTINGS)
    log = results.ProbeLog(folder, 0, lambda: None)
    results.table([results.heatmap_of(log.results, "s", 8.0)], [8], "frames")
    results.write_results(folder, log, {"s": 8.0})


# ---- pictures, films and records that show them --------------------------------------------------


def picture_files(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    for form in ("jpg", "webp", "gif", "bmp", "png"):  # named .pic, since `fuzz` leaves .png alone
        picture = Image.effect_noise((24, 16), 80).convert("P" if form == "gif" else "RGB")
        picture.save(folder / f"{form}.pic", format="jpeg" if form == "jpg" else form, exif=exif)


def read_pictures(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        video.picture_size(file)
        unires.preprocess(video.read_picture(file), 28, limit=4)


def film_files(folder: Path) -> None:
    films = pytest.importorskip("tests.test_data_video")  # skips without PyAV
    for name, codec in (("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"),
                        ("a.ts", "libx264"), ("a.mpg", "mpeg2video")):  # fmt: skip
        clock = Fraction(1, 25)
        films.film(folder / name, films.regular(24, 25), gop=8, clock=clock, picture=films.noisy, codec=codec)
    films.animation(folder / "a.gif")


def read_films(folder: Path) -> None:
    file = max(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)  # the one that was changed
    for how in ({"fps": 12.5}, {"count": 5, "shorter": "all"}):
        assert all(picture.mode == "RGB" for _, picture in video.frames(file, **how))


def record_files(folder: Path) -> None:
    for name in ("1.jpg", "2.png"):
        Image.new("RGB", (8, 6)).save(folder / name)
    asked, said = {"from": "human", "value": "<image>\nWhat? <image>"}, {"from": "gpt", "value": "A star."}
    talk = {"id": 1, "image": ["1.jpg", "2.png"], "conversations": [asked, said]}
    pair = {"id": "p", "image": "1.jpg", "prompt": "What?", "chosen": "A star.", "rejected": "A moon."}
    (folder / "records.json").write_text(json.dumps([talk, pair, talk]))
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (talk, pair, talk)))


def read_records(folder: Path) -> None:
    words = tokenizer.load_tokenizer(TOKENIZER)
    for name in ("records.json", "records.jsonl"):
        records = llava.open_records(folder / name, lambda one: 1 + len(llava.sizes(one, folder)), 0.9)
        for i in range(len(records)):
            for turns in llava.validate(records[i])[1]:
                llava.tokenize_and_trim(words, turns, [2] * len(llava.sizes(records[i], folder)), "qwen_1_5", True, 999)
        dataset = llava.json_dataset(records, folder, 2, 0, 1)
        for one in llava.load_examples(dataset, range(len(records)), lambda i, *sample: llava.Example(i, [], [])):
            assert isinstance(one, llava.Example) or len(one["why"]) <= 300
        json.dumps(records.bad)


READERS = {
    "config.json": (config_files, read_configs),
    "generation_config.json": (generation_file, read_generation),
    "vocab.json": (qwen2_files, read_tokenizer),
    "tokenizer.json": (tokenizer_json, read_tokenizer),
    "tokenizer.model": (sentencepiece_model, read_tokenizer),
    "safetensors": (model_folder, longva.load),
    "questions.json": (needle_folder, read_needles),
    "token files": (token_files, read_tokens),
    "run folder": (run_folder, open_run),
    "saved state": (saved_states, load_state),
    "vniah's folder": (vniah_folder, go_on_with_vniah),
    "pictures": (picture_files, read_pictures),
    "films": (film_files, read_films),
    "LLaVA records": (record_files, read_records),
}  # fmt: skip

# ---- mutations -----------------------------------------------------------------------------------

ODD = [None, True, False, -1, 0, 1, 2, 5, 3.7, -0.0, 1e-320, 1e308, math.nan, math.inf, 2**24, 10**9, 2**63, 10**30, 10**400,
       "", "1", "1e6", "x", "\ud800", "\0", "../../x", "x" * 10**5, "\u4e2d", [], {}, [[]], [1], ["x"], {"x": 1}, [None],
       {"": []}, "nan", "<|im_end|>", "a b", [1, 2], "[", "\n"]  # fmt: skip


def mutate_json(value: object, rng: random.Random) -> object:
    """Return JSON with a value replaced, removed, doubled or moved, most often deep inside."""
    value = copy.deepcopy(value)
    at = value
    while True:
        inner = at.values() if isinstance(at, dict) else at
        deeper = [one for one in inner if isinstance(one, (dict, list)) and one]
        if not deeper or rng.random() < 0.3:
            break
        at = rng.choice(deeper)
    if not at:
        return rng.choice(ODD)
    key = rng.choice([*at]) if isinstance(at, dict) else rng.randrange(len(at))
    what = rng.randrange(8)
    if what == 0:
        del at[key]
    elif what == 1 and isinstance(at, dict):
        at[rng.choice([*at, "x", "", "\ud800"])] = at.pop(key)
    elif what == 1:
        at.append(at[key])
    elif what == 2 and rng.random() < 0.3:
        return rng.choice(ODD)
    else:
        at[key] = rng.choice(ODD)
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with some changed, removed, doubled or added, most often near the beginning."""
    start = rng.randrange(max(1, rng.choice([16, 200, len(data)])))
    length = rng.choice([1, 1, 2, 8, 100])
    noise = rng.choice([rng.randbytes(length), b"\0" * length, b'"', b"}", b"[", b"\xff", b"9" * length, b"\n"])
    middle = rng.choice([noise, b"", noise + data[start : start + length], data[start : start + length] * 2])
    whole = data[:start] + middle + data[start + length :]
    return rng.choice([data[:start], b"", b"[" * 10**5] if rng.random() < 0.2 else [whole])


def mutate(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.8:
        changed = json.dumps(mutate_json(json.loads(data), rng)).encode()
    elif file.suffix == ".jsonl" and rng.random() < 0.8:
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(mutate_json(json.loads(lines[at]), rng)).encode()
        changed = b"\n".join(lines) + b"\n"
    else:
        changed = mutate_bytes(data, rng)
    file.unlink()
    file.write_bytes(changed)


# ---- the test ------------------------------------------------------------------------------------

MANY = range(100, 100 + 10_000 // len(READERS))


def is_sentence(error: BaseException) -> bool:
    """Would `flags.run` print this for the user, on one line of at most 300 characters?"""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = Path(frame.f_code.co_filename).parent in (ROOT, ROOT / "data")
    refused = (ours and type(error) is ValueError) or isinstance(error, OSError)
    return refused and len(str(error)) <= 300 and str(error).isprintable()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("cases", [range(27), pytest.param(MANY, marks=pytest.mark.slow)], ids=len)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(name, cases, tmp_path, tmp_path_factory, capsys):
    make, read = READERS[name]
    make(sound := tmp_path_factory.mktemp("sound"))
    files = {file.relative_to(sound): file.read_bytes() for file in sorted(sound.rglob("*")) if file.is_file()}
    wrong = []
    for case in cases:
        rng, folder = random.Random(f"{name} {case}"), tmp_path / f"{case}"
        for file, data in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        mutate(folder / rng.choice([file for file in files if file.suffix != ".png"]), rng)
        signal.alarm(20)
        try:
            read(folder)
        except BaseException as error:  # noqa: BLE001
            if not is_sentence(error):
                where = "".join(traceback.format_tb(error.__traceback__)[-2:])
                wrong.append(f"case {case}: {type(error).__name__}: {str(error)[:400]}\n{where}")
        finally:
            signal.alarm(0)
    capsys.readouterr()
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
