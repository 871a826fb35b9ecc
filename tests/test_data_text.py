"""Token files: every sequence once per epoch, resuming by number alone, and documents packed or refused."""

import gzip
import json
from itertools import count
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from data import flags, synthetic, text
from data.tokenizer import load_tokenizer

ODD = "A caption with <|im_end|> and <|endoftext|> in it\u2028and a line separator"
TEXTS = [" star moon", "red apple\nblue boat", ODD, "7" * 50, " ring"]


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(synthetic.TOKENIZER)


@pytest.fixture(scope="module")
def packed(words):
    """What a token file of TEXTS must hold."""
    return [i for t in TEXTS for i in [words.special["<|endoftext|>"], *words.encode(t)]]


@pytest.fixture
def tokens(tmp_path):
    """Opens a token file of the ids 0 ... n - 1, so that an id tells its place."""

    def make(n, dtype="uint16"):
        np.save(tmp_path / "tokens.npy", np.arange(n, dtype=dtype))
        return text.open_tokens(tmp_path / "tokens.npy")

    return make


# ---- windows ----


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_a_window_is_consecutive_ids_and_their_followers(tokens, dtype):
    ids_BS, targets_BS = text.windows(tokens(31, dtype), seq_len=5, rows=4, seed=0, part=0)
    assert ids_BS.shape == targets_BS.shape == (4, 5) and ids_BS.dtype == targets_BS.dtype == torch.int64
    assert torch.equal(ids_BS, ids_BS[:, :1] + torch.arange(5)) and torch.equal(targets_BS, ids_BS + 1)
    ids_BS.zero_()
    assert (targets_BS > 0).all()  # their own memory


@pytest.mark.parametrize("n, whole", [(31, 6), (35, 6), (36, 7)])
def test_every_window_once_per_epoch(tokens, n, whole):
    ids = tokens(n)
    firsts = torch.cat([text.windows(ids, 5, 2, 3, part)[0][:, 0] for part in range(2 * whole)]).tolist()
    epochs = [firsts[i : i + whole] for i in range(0, 4 * whole, whole)]
    assert all(sorted(epoch) == list(range(0, 5 * whole, 5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # a new order each time
    other = torch.cat([text.windows(ids, 5, 2, 4, part)[0][:, 0] for part in range(2 * whole)]).tolist()
    assert other != firsts


def test_any_part_can_be_made_alone(tokens):
    """Resuming starts at a part past the first epoch, in a process that has seen nothing before."""
    ids = tokens(31)
    straight = [text.windows(ids, 5, 2, 9, part) for part in range(12)]
    text.permutation.cache_clear()
    for part in (11, 7, 4):
        assert all(torch.equal(a, b) for a, b in zip(straight[part], text.windows(ids, 5, 2, 9, part)))
    halves = [text.windows(ids, 5, 1, 9, part)[0] for part in range(24)]
    assert torch.equal(torch.cat([ids_BS for ids_BS, _ in straight]), torch.cat(halves))  # rows do not matter


def test_a_short_file_is_refused(tokens):
    assert text.windows(tokens(6), 5, 1, 0, 0)[1].tolist() == [[1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match=r"tokens.npy holds 5 tokens, expected at least 6"):
        text.windows(tokens(5), 5, 1, 0, 0)


def test_largest(tmp_path):
    for ids, dtype, top in (
        ([3, 65535, 0], "uint16", 65535),
        ([1, 2, 70000], "uint32", 70000),
        ([1, -1], "int32", 2**32 - 1),
    ):
        np.save(tmp_path / "t.npy", np.array(ids, dtype=dtype))
        assert text.largest(text.open_tokens(tmp_path / "t.npy"), block=2) == top


@pytest.mark.parametrize("content, complaint", [
    (None, "No such file"),
    (b"", "is not a token file"),
    (b"not numpy at all, but long enough", "is not a token file"),
    (np.arange(0, dtype=np.uint16), r"holds uint16\[0\]"),
    (np.zeros((2, 3), np.uint16), r"holds uint16\[2, 3\]"),
    (np.arange(3), r"holds int64\[3\]"),
    (np.arange(3, dtype=">u2"), "holds >u2"),
    (np.array([{}], dtype=object), "is not a token file"),
])  # fmt: skip
def test_what_is_no_token_file(tmp_path, content, complaint):
    file = tmp_path / "odd.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        np.save(file, content)
    with pytest.raises(ValueError, match=rf"odd\.npy .*{complaint}"):
        text.open_tokens(file)


def test_a_cut_token_file_is_refused(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(1000, dtype=np.uint16))
    (tmp_path / "t.npy").write_bytes((tmp_path / "t.npy").read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"t\.npy is not a token file"):
        text.open_tokens(tmp_path / "t.npy")


# ---- packing ----


def zst(path, *frames):
    with open(path, "wb") as file:
        for frame in frames:
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(frame)
            file.write(sink.getvalue())


def corpus(folder, kind, words, texts=TEXTS):
    """`texts` in files of one kind."""
    file = folder / f"corpus{kind}"
    lines = [json.dumps({"text": t, "meta": {}}, ensure_ascii=n % 2 > 0) + "\n" for n, t in enumerate(texts)]
    whole = "".join([*lines[:2], "\n", *lines[2:]]).encode()  # a blank line is no document
    if kind == ".txt":
        for n, t in enumerate(texts):
            (folder / f"{n}.txt").write_text(t, encoding="utf-8")
        return [folder / f"{n}.txt" for n in range(len(texts))]
    if kind == ".jsonl":
        file.write_bytes(whole.removesuffix(b"\n"))
    elif kind == ".jsonl.gz":
        file.write_bytes(gzip.compress(whole))
    elif kind == ".jsonl.zst":
        zst(file, whole[:40], whole[40:])
    elif kind == ".parquet":
        parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), file, row_group_size=2)
    else:
        ids = [words.encode(t) for t in texts]
        ids[1] = [words.bos_id, *ids[1]]  # a separator that is there already is not doubled
        file = folder / f"ids{kind.removeprefix('ids')}"
        if kind == "ids.parquet":
            parquet.write_table(pyarrow.table({"labels": ids, "input_ids": ids, "text": texts}), file)
        else:
            file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return [file]


KINDS = [".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", "ids.parquet", "ids.jsonl"]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_every_kind_pack_alike(tmp_path, words, packed, kind):
    out = tmp_path / "new" / "tokens.npy"
    assert text.pack(corpus(tmp_path, kind, words), words, out) == (len(TEXTS), len(packed), [])
    assert text.open_tokens(out).tolist() == np.load(out).tolist() == packed
    assert text.open_tokens(out).dtype == np.uint16 and [f.name for f in out.parent.iterdir()] == ["tokens.npy"]
    assert packed.count(words.bos_id) == len(TEXTS)  # <|endoftext|> in a text is text


def test_a_large_vocabulary_needs_four_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        top = SimpleNamespace(size=size, bos_id=0, encode=lambda _, size=size: [size - 1])
        text.pack([tmp_path / "a.txt"], top, tmp_path / "t.npy")
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
    documents, tokens, left_out = text.pack([file], words, out)
    assert (documents, tokens, len(left_out)) == (999, 2 * 999, 1) and len(text.open_tokens(out)) == tokens
    assert left_out[0].startswith(f"{file}, document 501: ")


def test_too_many_bad_documents_stop_it(tmp_path, words, monkeypatch):
    file, out = tmp_path / "a.jsonl", tmp_path / "t.npy"
    out.write_bytes(b"an older file")
    file.write_text('{"text": " star"}\n' * 1997 + "bad\n" * 3)
    with pytest.raises(
        ValueError, match=r"^3 of 2,000 documents are bad, at most 0\.1%.*a\.jsonl, document 1998: Expecting"
    ):
        text.pack([file], words, out)
    assert out.read_bytes() == b"an older file" and sorted(f.name for f in tmp_path.iterdir()) == ["a.jsonl", "t.npy"]
    file.write_text("bad\n" * 50)
    monkeypatch.setattr(text, "BAD_EARLY", 10)  # it does not read a wrong corpus to its end
    with pytest.raises(ValueError, match="11 of 11 documents"):
        text.pack([file], words, out)


@pytest.mark.parametrize("kind", [".jsonl.zst", ".jsonl.gz", ".parquet"])
def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path, words, kind):
    (file,) = corpus(tmp_path, kind, words)
    if kind == ".jsonl.zst":  # one frame: a cut between two cannot be known from the file
        zst(file, b'{"text": " star moon"}\n' * 20)
    whole, out = file.read_bytes(), tmp_path / "t.npy"
    for n in [*range(1, len(whole), 1 + len(whole) // 40), len(whole) - 1]:
        file.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=rf"corpus{kind} cannot be read"):
            text.pack([file], words, out)
    assert not out.exists() and [f.name for f in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("name, content, complaint", [
    ("a.csv", b"x", r"a\.csv is of an unknown kind; expected a name that ends in \.txt"),
    ("a.jsonl", None, "is no file"),
    ("a.jsonl.zst", b"", "is empty"),
    ("a.jsonl", b"\n \n", "hold no document"),
    ("a.txt", b"\xff\xfe", "cannot be read to its end"),
    ("a.jsonl.gz", b"no gzip", "cannot be read to its end"),
    ("a.jsonl", b'{"text": "' + b"x" * 99 + b'"}', "a line of more than 64 bytes"),
])  # fmt: skip
def test_files_that_are_refused(tmp_path, words, monkeypatch, name, content, complaint):
    monkeypatch.setattr(text, "LONGEST", 64)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        text.pack([tmp_path / name], words, tmp_path / "t.npy")
    assert not (tmp_path / "t.npy").exists()


def test_parquet_without_text_is_refused(tmp_path, words):
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has the columns \['body'\], expected 'text' or 'input_ids'"):
        text.pack([tmp_path / "a.parquet"], words, tmp_path / "t.npy")


def test_an_empty_cell_of_parquet_is_a_bad_document(tmp_path, words):
    for column, good in (("text", " star"), ("input_ids", [5])):
        rows = [good] * 1998 + [None, [None, 5] if column == "input_ids" else ""]
        parquet.write_table(pyarrow.table({column: rows}), tmp_path / "a.parquet")
        documents, _, left_out = text.pack([tmp_path / "a.parquet"], words, tmp_path / "t.npy")
        assert documents == 1998 and len(left_out) == 2


def test_one_document_at_a_time(tmp_path, words, monkeypatch):
    """Nothing is collected first: an endless file is read no further than where it must stop."""

    def endless(_path):
        for n in count():
            assert n < 3004
            yield " star" if n < 3000 else b"bad"

    monkeypatch.setitem(text.READERS, ".txt", endless)
    monkeypatch.setattr(text, "BAD_EARLY", 3)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="4 of 3,004"):
        text.pack([tmp_path / "a.txt"], words, tmp_path / "t.npy")


# ---- as it is used ----


def test_command_line(tmp_path, words, packed, capsys):
    out = tmp_path / "t.npy"
    (file,) = corpus(tmp_path, ".jsonl", words)
    argv = ["--tokenizer", str(synthetic.TOKENIZER), "--out", str(out), str(file), str(file)]
    flags.run(text.main, text.Config, argv=argv)
    said = capsys.readouterr().out
    assert f"{out}: 10 documents, {2 * len(packed)} tokens\n" in said and f"--corpus {out}" in said
    assert text.open_tokens(out).tolist() == packed * 2
    with pytest.raises(SystemExit) as stopped:
        flags.run(text.main, text.Config, argv=[*argv, str(tmp_path / "none.jsonl")])
    assert stopped.value.code == 2 and "none.jsonl is no file" in capsys.readouterr().err


def test_the_training_script_reads_it(tmp_path):
    import train_text

    np.save(tmp_path / "t.npy", np.arange(100, dtype=np.uint16))
    cfg = train_text.Config(corpus=str(tmp_path / "t.npy"), seq_len=8, batch=2)
    ids_BS, targets_BS = train_text.make_batches(cfg, SimpleNamespace(size=100))(7)
    assert ids_BS.shape == (2, 8) and torch.equal(targets_BS, ids_BS + 1)
    with pytest.raises(ValueError, match=r"token 99, but the model's tokenizer has 99"):
        train_text.make_batches(cfg, SimpleNamespace(size=99))
