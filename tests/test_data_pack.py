"""Packing: documents packed or refused, sources that keep their shares, and killed runs that end with the same bytes."""

import fcntl
import gzip
import itertools
import json
import os
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from data import flags, pack, runs, synthetic, text
from data.tokenizer import load_tokenizer

ODD = "A caption with <|im_end|> and <|endoftext|> in it\u2028and a line separator"
TEXTS = [" star moon", "red apple\nblue boat", ODD, "7" * 50, " ring"]


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(synthetic.TOKENIZER)


def packs(files, words, out, keep_short=1.0, **settings):
    """Without upsampling, unless it is asked for."""
    return pack.pack(pack.Config(tuple(files), synthetic.TOKENIZER, out, keep_short=keep_short, **settings), words)


def command(files, out, settings):
    """Pack as on the command line."""
    argv = f"--tokenizer {synthetic.TOKENIZER} --out {out} {settings}".split()
    flags.run(pack.main, pack.Config, argv=[*map(str, files), *argv])


def refused(out, complaint, *tokenizer):
    with pytest.raises(ValueError, match=complaint):
        text.open_tokens(out, *tokenizer)


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)))


# ---- packing -------------------------------------------------------------------------------------

zst = partial(pyarrow.compress, codec="zstd", asbytes=True)


def corpus(folder, kind, words):
    """TEXTS in files of one kind."""
    if kind == ".txt":
        for n, t in enumerate(TEXTS):
            (folder / f"{n}.txt").write_text(t, encoding="utf-8")
        return [folder]
    lines = [json.dumps({"text": t, "meta": {}}, ensure_ascii=n % 2 > 0) + "\n" for n, t in enumerate(TEXTS)]
    whole = "".join([*lines[:2], "\n", *lines[2:]]).encode()  # a blank line is no document
    ids = [words.encode(t) for t in TEXTS]
    ids[1] = [words.bos_id, *ids[1]]  # a separator that is there already is not doubled
    contents = {
        ".jsonl": whole.removesuffix(b"\n"),
        ".jsonl.gz": gzip.compress(whole),
        ".jsonl.zst": zst(whole[:40]) + zst(whole[40:]),
        ".ids.jsonl": "\n".join(json.dumps({"input_ids": row}) for row in ids).encode(),
    }
    tables = {
        ".parquet": {"n": range(len(TEXTS)), "text": TEXTS},
        ".ids.parquet": {"labels": ids, "input_ids": ids, "text": TEXTS},
    }
    file = folder / f"corpus{kind}"
    if kind in tables:
        parquet.write_table(pyarrow.table(tables[kind]), file, row_group_size=2)
    else:
        file.write_bytes(contents[kind])
    return [file]


@pytest.mark.parametrize("kind", ".txt .jsonl .jsonl.gz .jsonl.zst .parquet .ids.parquet .ids.jsonl".split())
def test_documents_of_every_kind_pack_alike(tmp_path, words, kind):
    out = tmp_path / "new" / "tokens.npy"
    packed = [i for t in TEXTS for i in [words.special["<|endoftext|>"], *words.encode(t)]]
    told = packs(corpus(tmp_path, kind, words), words, out)
    assert (told["documents"], told["kept"], told["tokens"], told["bad"]) == (5, 5, len(packed), {})
    assert text.open_tokens(out).tolist() == np.load(out).tolist() == packed
    assert text.open_tokens(out).dtype == np.uint16
    assert {f.name for f in out.parent.iterdir()} == {"tokens.npy", "tokens.summary.json"}
    assert packed.count(words.bos_id) == len(TEXTS)  # <|endoftext|> in a text is text


def test_a_large_vocabulary_needs_four_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        top = SimpleNamespace(size=size, bos_id=0, pieces={}, encode=lambda _, size=size: [size - 1])
        packs([tmp_path / "a.txt"], top, tmp_path / "t.npy")
        tokens = text.open_tokens(tmp_path / "t.npy")
        assert tokens.tolist() == [0, size - 1] and tokens.dtype == dtype


BAD = ['{"text": "cut', "7", '{"body": "x"}', '{"text": null}', '{"text": 3}', '{"text": ""}', r'{"text": "\ud800"}', "[" * 10**5,
       '{"text": ' + "9" * 5000 + "}", '{"input_ids": []}', '{"input_ids": [1.5]}', '{"input_ids": [[1], [2]]}', '{"input_ids": [[1], 2]}',
       '{"input_ids": [true]}', '{"input_ids": [-1]}', '{"input_ids": [657]}', '{"input_ids": [1e99, 99999999999999999999999]}']  # fmt: skip


@pytest.mark.parametrize("bad", [*BAD, b'{"text": "\xff"}'], ids=lambda bad: str(bad)[:28])
def test_a_bad_document_is_left_out_and_told(tmp_path, words, bad):
    file, out = tmp_path / "a.jsonl", tmp_path / "t.npy"
    good = [b'{"text": " star"}'] * 999
    file.write_bytes(b"\n".join([*good[:500], bad if isinstance(bad, bytes) else bad.encode(), *good[500:]]))
    told = packs([file], words, out)
    assert (told["documents"], told["tokens"]) == (999, 2 * 999) and len(text.open_tokens(out)) == 2 * 999
    ((kind, number),) = told["bad"].items()
    assert number == 1 and told["first_bad"][0].startswith(f"{file}, document 501: {kind}: ")


def test_too_many_bad_documents_stop_it(tmp_path, words, monkeypatch):
    file, out = tmp_path / "a.jsonl", tmp_path / "t.npy"
    out.write_bytes(b"an older file")
    file.write_text('{"text": " star"}\n' * 1997 + "bad\n" * 3)
    said = r"^3 of 2,000 documents are bad, at most 0\.1%.*a\.jsonl, document 1998: not JSON: Expecting"
    with pytest.raises(ValueError, match=said):
        packs([file], words, out)
    file.write_text("bad\n" * 50)
    monkeypatch.setattr(pack, "BAD_BEFORE_END", 10)  # it does not read a wrong corpus to its end
    monkeypatch.setattr(pack, "SAVE_EVERY", 12)
    with pytest.raises(ValueError, match="12 of 12 documents"):
        packs([file], words, out)
    assert out.read_bytes() == b"an older file" and sorted(f.name for f in tmp_path.iterdir()) == ["a.jsonl", "t.npy"]


def test_a_giant_line_is_one_bad_document(tmp_path, words, monkeypatch):
    """However it ends, the lines around it are read as they are."""
    monkeypatch.setattr(runs, "MAX_LINE_BYTES", 64)
    for giant in (65, 128, 130, 195, 1000):
        lines = ['{"text": " star"}'] * 999 + ["x" * giant] + ['{"text": " moon"}'] * 2
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        told = packs([tmp_path / "a.jsonl"], words, tmp_path / "t.npy", seed=giant)
        assert told["bad"] == {"giant line": 1} and told["documents"] == 1001
        assert told["first_bad"][0].endswith("giant line: more than 64 bytes")


@pytest.mark.parametrize("kind", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path, words, kind):
    (file,) = corpus(tmp_path, kind, words)
    if kind == ".jsonl.zst":  # one frame: a cut between two cannot be known from the file
        file.write_bytes(zst(b'{"text": " star moon"}\n' * 20))
    whole, out = file.read_bytes(), tmp_path / "t.npy"
    for n in [*range(1, len(whole), 1 + len(whole) // 40), len(whole) - 1]:
        file.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=rf"corpus{kind} cannot be read"):
            packs([file], words, out)
    assert not out.exists()
    file.write_bytes(whole)  # copied again: the draft goes on from where it was
    assert packs([file], words, out)["documents"] == (20 if kind == ".jsonl.zst" else 5)
    assert {f.name for f in tmp_path.iterdir()} == {file.name, "t.npy", "t.summary.json"}


@pytest.mark.parametrize("name, content, complaint", [
    ("a.csv", b"x", r"a\.csv is of an unknown kind; expected a name that ends in \.txt"),
    ("a.jsonl", None, "is no file"),
    ("a.jsonl.zst", b"", "is empty"),
    ("a.jsonl", b"\n \n", "hold no document"),
    ("a.txt", b"\xff\xfe", "is not UTF-8 .*iconv"),
    ("a.parquet", pyarrow.table({"body": ["x"]}), r"a\.parquet has the columns \['body'\], expected 'text' or 'input_ids'"),
])  # fmt: skip
def test_files_that_are_refused(tmp_path, words, name, content, complaint):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content:
        parquet.write_table(content, tmp_path / name)
    with pytest.raises(ValueError, match=complaint):
        packs([tmp_path / name], words, tmp_path / "t.npy")
    assert not (tmp_path / "t.npy").exists()


def test_an_empty_cell_of_parquet_is_a_bad_document(tmp_path, words):
    for column, good in (("text", " star"), ("input_ids", [5])):
        rows = [good] * 1998 + [None, [None, 5] if column == "input_ids" else ""]
        parquet.write_table(pyarrow.table({column: rows}), tmp_path / "a.parquet")
        told = packs([tmp_path / "a.parquet"], words, tmp_path / "t.npy", seed=len(column))
        assert told["documents"] == 1998 and sum(told["bad"].values()) == 2


# ---- upsampling ----------------------------------------------------------------------------------

SOURCES = {"Book": (0.05, 24_000), "Web": (0.67, 1500), "Code": (0.28, 5000)}  # share of documents, usual characters


def sources_corpus(folder, count, files=1):
    """Documents of three sources in JSONL files: (files, tokens of each source, short and long)."""
    rng, tokens, rows = np.random.default_rng(0), np.zeros((3, 2)), [[] for _ in range(files)]
    for n in range(count):
        source = rng.choice(3, p=[share for share, _ in SOURCES.values()])
        name, (_, characters) = list(SOURCES.items())[source]
        length = max(1, int(characters * rng.lognormal(0, 0.7)) // 368)
        tokens[source, int(length + 1 >= 16)] += length + 1
        rows[n % files].append({"input_ids": [1 + n % 200] * length, "meta": {"redpajama_set_name": name}})
    for n in range(files):
        write_lines(folder / f"{n}.jsonl", rows[n])
    return [folder / f"{n}.jsonl" for n in range(files)], tokens


def test_long_documents_gain_and_sources_keep_their_shares(tmp_path, words):
    """Over several seeds, against counts made here, and what the summary says against what the token files hold."""
    files, before = sources_corpus(tmp_path, 1500, files=2)  # more workers than files: they share out documents
    shares, after = before.sum(1) / before.sum(), np.zeros((3, 2))
    for seed in range(8):
        settings = {"long": 16, "workers": 3, "seed": seed}
        told = pack.summarize([packs(files, words, tmp_path / "out", 0.3, worker=n, **settings) for n in (2, 1, 0)])
        tokens = text.open_tokens(tmp_path / "out", words)
        assert len(tokens) == told["tokens"] and told["documents"] == 1500
        assert int((tokens[:] == words.bos_id).sum()) == told["kept"]
        after += [[told["table"][source][length]["tokens"] for length in ("short", "long")] for source in SOURCES]
        assert [told["sources"][source]["share_before"] for source in SOURCES] == pytest.approx(shares, abs=0.01)
    assert [told["sources"][source]["share_after"] for source in SOURCES] == pytest.approx(shares, abs=0.15)
    assert after.sum(1) / after.sum() == pytest.approx(shares, abs=0.03)
    long = before[:, 1] / (before[:, 1] + 0.3 * before[:, 0])  # part of each source's tokens
    assert after[:, 1] / after.sum(1) == pytest.approx(long, abs=0.05)
    assert after.sum() == pytest.approx(8 * 0.3 * before.sum(), rel=0.1)


@pytest.mark.parametrize("kind", [".jsonl.zst", ".parquet"])
def test_the_source_of_a_document(tmp_path, words, kind):
    """As SlimPajama names it; anything else there is no name, and no reason to leave a document out."""
    file, metas = tmp_path / f"a{kind}", [{"redpajama_set_name": name} for name in ("RedPajamaBook", "RedPajamaC4")]
    rows = [{"text": " star", "meta": meta} for meta in [*metas, None]]
    if kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        odd = [{"redpajama_set_name": [1]}, 3, {"redpajama_set_name": "\ud800"}]  # the last is no UTF-8
        rows += [{"text": " star", "meta": meta} for meta in odd]
        file.write_bytes(zst("\n".join(map(json.dumps, rows)).encode()))
    told = packs([file], words, tmp_path / "t.npy")
    unnamed = {pack.UNNAMED: 1} if kind == ".parquet" else {pack.UNNAMED: 3, "?": 1}
    assert {s: n["kept"] for s, n in told["sources"].items()} == {"RedPajamaBook": 1, "RedPajamaC4": 1} | unnamed
    assert pack.report(file, told).encode()


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_in_expectation_each_source_keeps_the_same_part(keep):
    """The coins' probabilities, added up over documents: `keep` of the tokens of each source, long ones gaining."""
    rng = np.random.default_rng(0)
    for _, characters in SOURCES.values():
        total, kept = [0.0, 0.0], [0.0, 0.0]  # of short and long documents
        for tokens in np.maximum(1, characters * rng.lognormal(0, 0.7, 4000) / 368):
            long = int(tokens >= 16)
            total[long] += tokens
            probability = pack.keep_probability(bool(long), keep, total[1], total[0])
            assert 0 < probability <= 1 + 1e-9
            kept[long] += probability * tokens
        assert sum(kept) / sum(total) == pytest.approx(keep, rel=0.02)
        assert kept[0] / total[0] == pytest.approx(keep * kept[1] / total[1], rel=0.05)


# ---- kills, workers ------------------------------------------------------------------------------


def killed_at(document, pack_it):
    """Pack in a process of its own that is killed when it has come to this document."""
    calls, encode = itertools.count(), pack.encode

    def encode_or_die(*arguments):
        if next(calls) == document:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*arguments)

    if (child := os.fork()) == 0:
        pack.encode = encode_or_die
        pack_it()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_what_is_complete_is_not_made_again(tmp_path, words, monkeypatch, capsys):
    """But anew, with a sentence, where documents, settings or the token file itself have changed."""
    (file,), _ = sources_corpus(tmp_path, 50)
    out, content = tmp_path / "t.npy", file.read_text()
    first = packs([file], words, out)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_documents", None)
        assert packs([file], words, out) == json.loads(json.dumps(first)) and not capsys.readouterr().out
    whole = out.read_bytes()
    for spoiled in (whole[:-2], whole[:-2] + b"\5\0"):
        out.write_bytes(spoiled)
        refused(out, "is not a token file|has changed since it was packed", words)
        packs([file], words, out)
        assert out.read_bytes() == whole and capsys.readouterr().out == f"{out} is packed anew: damaged\n"
    file.write_text(content.replace("1", "2", 1))  # neither name nor size
    assert packs([file], words, out)["tokens"] == first["tokens"] and out.read_bytes() != whole
    assert capsys.readouterr().out == f"{out} is packed anew: changed file_contents\n"
    assert packs([file], words, out, 0.1, long=16)["kept"] < first["kept"]  # other settings
    assert "changed long, keep_short" in capsys.readouterr().out


def test_a_draft_of_another_job_or_without_its_tokens_is_not_continued(tmp_path, words, monkeypatch):
    (file,), _ = sources_corpus(tmp_path, 100)
    monkeypatch.setattr(pack, "SAVE_EVERY", 10)
    whole, content = packs([file], words, tmp_path / "whole.npy"), file.read_text()
    for spoil in ("draft", "settings", "documents", "journal"):
        out, journal = tmp_path / f"{spoil}.npy", tmp_path / f".{spoil}.npy.journal"
        file.write_text(content.replace("1", "2", 1) if spoil == "documents" else content)
        killed_at(55, lambda out=out, seed=int(spoil == "settings"): packs([file], words, out, seed=seed))
        file.write_text(content)
        if spoil == "draft":
            (tmp_path / f".{spoil}.npy.writing").unlink()
        if spoil == "journal":
            journal.write_text(journal.read_text().replace('"tokens": ', '"tokens": 1', 1))
        assert packs([file], words, out)["table"] == whole["table"]
        assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_a_part_that_was_published_meanwhile_is_not_touched(tmp_path, words, monkeypatch):
    """Nor one that another process writes; a second one opens its draft before the first one renames it, then locks."""
    files, out, flock = sources_corpus(tmp_path, 10)[0], tmp_path / "t.npy", fcntl.flock

    def first_ends_before(file, how):
        monkeypatch.setattr(pack.fcntl, "flock", flock)
        packs(files, words, out)
        flock(file, how)

    with open(tmp_path / ".t.npy.writing", "w") as held:
        flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"t\.npy is being written by another process"):
            packs(files, words, out)
    monkeypatch.setattr(pack.fcntl, "flock", first_ends_before)
    with pytest.raises(ValueError, match=r"t\.npy is being written by another process"):
        packs(files, words, out)
    assert len(text.open_tokens(out, words))


@pytest.mark.parametrize("files, workers", [(5, 2), (1, 3), (2, 7)])
def test_workers_share_the_documents_out(tmp_path, words, files, workers):
    """Each document once, whatever is shared out; a folder of parts reads as one file."""
    for n in range(files):
        rows = [{"input_ids": [i % 600, n + 1]} for i in range(100 * n, 100 * n + 100)]
        write_lines(tmp_path / f"in/deep/{n}.jsonl", rows)
    parts = [packs([tmp_path / "in"], words, tmp_path / "out", workers=workers, worker=n) for n in range(workers)]
    assert min(part["kept"] for part in parts) >= 100 * files // workers - files - 100 * (files >= workers)
    tokens, one = text.open_tokens(tmp_path / "out", words), tmp_path / "one.npy"
    packs([tmp_path / "in"], words, one)
    assert sorted(tokens[:].reshape(-1, 3).tolist()) == sorted(np.load(one).reshape(-1, 3).tolist())
    assert len(tokens) == 300 * files and text.largest_id(tokens, 7) == words.bos_id
    np.save(tmp_path / "joined.npy", tokens[:])
    joined = text.open_tokens(tmp_path / "joined.npy")
    for part in range(20):
        both = [text.windows(t, 17, 2, 3, part) for t in (tokens, joined)]
        assert all(torch.equal(a, b) for a, b in zip(*both))


def test_folders_that_are_refused(tmp_path, words):
    files, out = sources_corpus(tmp_path, 20, files=2)[0], tmp_path / "out"
    out.mkdir()
    refused(out, "out holds no token files")
    packs(files, words, out, workers=2, worker=1)
    refused(out, r"out holds 1 files of a corpus in 2 parts, missing \[0\]")
    packs(files, words, out, workers=2, worker=0, seed=1)
    refused(out, "out mixes parts that were packed with different seed")
    packs(files, words, out, workers=2, worker=0)
    text.open_tokens(out)
    packs(files, words, out)
    refused(out, "out holds 3 files of a corpus in 1 parts")


def test_tokens_of_another_tokenizer_are_refused(tmp_path, words):
    files, out, summary = sources_corpus(tmp_path, 20)[0], tmp_path / "t.npy", tmp_path / "t.summary.json"
    packs(files, words, out)
    text.open_tokens(out, words)
    other = SimpleNamespace(size=words.size, pieces={**words.pieces, 5: b"other"})
    refused(out, r"t\.npy was packed with another tokenizer, of 657 ids, than the model's", other)
    np.save(out, np.arange(9, dtype=np.uint16))
    refused(out, r"t\.npy holds 9 tokens, but t\.summary\.json lists")
    for wrong in ('{"tokens": 9}', summary.read_text().replace('"job"', '"jab"')):
        summary.write_text(wrong)
        refused(out, r"t\.summary\.json is damaged; remove it")


@pytest.mark.parametrize("wrong, complaint", [
    ({"worker": 2, "workers": 2}, "--worker is 2, expected 0 to 1"),
    ({"workers": 2, "out": "t.npy"}, "2 workers write a file each; give a folder"),
    ({"keep_short": 0.0}, "--keep-short is 0.0"),
    ({"long": 0}, "--long is 0, expected 1 token or more"),
])  # fmt: skip
def test_settings_that_are_refused(tmp_path, wrong, complaint):
    out = tmp_path / wrong.pop("out", "out")
    with pytest.raises(ValueError, match=complaint):
        pack.Config((tmp_path,), tmp_path, out, **wrong)


# ---- as it is used -------------------------------------------------------------------------------


def test_command_line(tmp_path, words, capsys):
    out, one = tmp_path / "t.npy", tmp_path / "one.npy"
    (file,) = corpus(tmp_path, ".jsonl", words)
    packs([file], words, one)
    command([file, file], out, "--keep-short 1")
    said, tokens = capsys.readouterr().out, 2 * text.open_tokens(one).tolist()
    assert f"{out}: 10 documents, 10 kept, {len(tokens)} tokens\n" in said and f"--corpus {out}" in said
    assert text.open_tokens(out).tolist() == tokens
    with pytest.raises(SystemExit) as stopped:
        command([tmp_path / "none.jsonl", file], out, "")
    assert stopped.value.code == 2 and "none.jsonl is no file" in capsys.readouterr().err


def test_command_line_of_workers(tmp_path, words, capsys):
    """Each says what it did; the last adds them up, beside the parts; so too anew, with other settings."""
    files, out = sources_corpus(tmp_path, 300, files=2)[0], tmp_path / "out"
    for seed in (0, 1):
        for n in (1, 0):
            command(files, out, f"--long 16 --worker {n} --workers 2 --seed {seed}")
            said = capsys.readouterr().out
            assert ("1 of 2 files are complete" in said) == (n == 1) and "Book " in said
        whole = json.loads((out / "summary.json").read_text())
        assert whole["documents"] == 300 and whole["tokens"] == len(text.open_tokens(out, words))
        assert f"{out}: 300 documents" in said and f"--corpus {out}\n" in said


def test_a_worker_without_a_document_leaves_the_corpus_whole(tmp_path, words):
    """One document for two workers; and what others wrote beside the token files stays."""
    (tmp_path / "a.txt").write_text("the red star", encoding="utf-8-sig")
    out = tmp_path / "out"
    (out / ".tmp-mine").mkdir(parents=True)
    for n in (1, 0):
        command([tmp_path / "a.txt"], out, f"--keep-short 1 --worker {n} --workers 2")
    assert json.loads((out / "summary.json").read_text())["documents"] == 1 and (out / ".tmp-mine").is_dir()
    assert len(text.open_tokens(out, words)) == 1 + len(words.encode("the red star"))
