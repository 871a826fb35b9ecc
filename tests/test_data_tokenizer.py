"""Our tokenizers against Hugging Face's and sentencepiece's own, on random text in many scripts."""

import json
import random
import shutil
import unicodedata

import pytest

from data import tokenizer as t

WORDS = ["star", " star", "red", " red", " the", "the", "\n", "\n\n", ".\n", ".", "?", "7", " ", "caf\u00e9"]
SCRIPTS = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F),
           (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F), (0x3040, 0x30FF), (0x4E00, 0x4FFF), (0xAC00, 0xAD00),
           (0xFF00, 0xFF60), (0x1F300, 0x1F64F), (0x1D400, 0x1D4FF), (0x00, 0x1F), (0x30, 0x39), (0x7F, 0x9F),
           (0x0, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x3FFFF), (0x40000, 0x10FFFF)]  # fmt: skip
BITS = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\r", "\n\r\n", " \n ", "\v\f\x85", "'s", "'LL", "12",
        "1234567890", "\u0663\u0664", "\u00bd\u2167", "\u0130'S", "'\u017f", "\ufeff", "e\u0301", "\u1100\u1161", "...", *WORDS,
        "it's 3.14\n\n  x", *t.QWEN2_SPECIALS, "<|im_", "end|>", "<image>"]  # fmt: skip


def fuzz(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(0, 8)):
            low, high = rng.choice(SCRIPTS)
            letters = "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))
            parts.append(rng.choice([letters, rng.choice(BITS)]))
        yield "".join(parts)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    t.write_qwen2(folder, *t.train_bpe(WORDS))
    return folder


@pytest.fixture(scope="module")
def tokenizer(ours):
    return t.load_tokenizer(ours)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """tokenizer.json of Qwen2's kind, trained by the tokenizers library."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

    whole = tokenizers.Tokenizer(models.BPE())
    whole.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(t.QWEN2_WORDS), "isolated")
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.pre_tokenizer = pre_tokenizers.Sequence([words, spelling])
    whole.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    whole.train_from_iterator([*fuzz(3000, seed=1), *t.__doc__.split("\n")], trainer)
    whole.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in t.QWEN2_SPECIALS])
    folder = tmp_path_factory.mktemp("theirs")
    whole.save(str(folder / "tokenizer.json"))
    return folder


def check_same(encode, tokenizer, count=1500):
    for text in fuzz(count):
        ids = tokenizer.encode(text, special=True)
        assert ids == encode(text), repr(text)
        parts = enumerate(tokenizer.split(text))  # text and control tokens, by turns
        assert tokenizer.decode(ids) == "".join(s if n % 2 else unicodedata.normalize("NFC", s) for n, s in parts)


def test_same_ids_as_tokenizers(theirs):
    import tokenizers

    whole = tokenizers.Tokenizer.from_file(str(theirs / "tokenizer.json"))
    ours = t.load_tokenizer(theirs)
    assert ours.size == whole.get_vocab_size() == 1503
    check_same(lambda text: whole.encode(text).ids, ours, count=3000)
    whole.encode_special_tokens = True  # control tokens in a text are text
    for text in fuzz(1500, seed=2):
        assert ours.encode(text) == whole.encode(text).ids, repr(text)


@pytest.mark.oracle
def test_transformers_reads_what_we_write(ours, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(ours)
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    assert len(theirs) == tokenizer.size and theirs.eos_token_id == tokenizer.special["<|im_end|>"]
    assert theirs.pad_token_id == tokenizer.pad_id
    check_same(theirs.encode, tokenizer)


def test_vocab_json_is_the_same_tokenizer(theirs, tmp_path):
    whole = json.loads((theirs / "tokenizer.json").read_text())
    t.write_qwen2(tmp_path, whole["model"]["vocab"], [tuple(m) for m in whole["model"]["merges"]])
    one, other = t.load_tokenizer(theirs), t.load_tokenizer(tmp_path)
    assert one.special == other.special
    assert all(one.encode(text, special=True) == other.encode(text, special=True) for text in fuzz(200))
    whole["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}  # as other families' folders have beside it
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"words are split by .* expected the pattern"):
        t.load_tokenizer(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "merges.txt"):
        (tmp_path / file).unlink()
    assert t.load_tokenizer(tmp_path).special == one.special  # without a list, Qwen2's three follow the vocabulary
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 7000}))
    assert t.load_tokenizer(tmp_path).special == {"<|im_end|>": 7000}


def test_trained_words_are_one_token_and_bytes_come_first(tokenizer):
    assert all(len(tokenizer.encode(w)) == 1 for w in WORDS)
    assert [tokenizer.encode(c) for c in (".", "\n", " ")] == [[13], [198], [220]]  # as in Qwen2
    assert sorted(tokenizer.pieces[i] for i in range(256)) == [bytes([b]) for b in range(256)]


def test_training_does_not_depend_on_order_and_follows_counts():
    assert t.train_bpe(WORDS) == t.train_bpe(WORDS[::-1])
    assert t.train_bpe({"ab": 1, "bc": 5})[1] == [("b", "c"), ("a", "b")]
    with pytest.raises(ValueError, match="'12'"):
        t.train_bpe(["red", "12"])  # which cannot be one token


def test_control_tokens_only_where_asked(tokenizer):
    red, end, pad = tokenizer.encode("red"), tokenizer.special["<|im_end|>"], tokenizer.special["<|endoftext|>"]
    assert tokenizer.encode("red<|im_end|>red", special=True) == [*red, end, *red]
    assert end not in tokenizer.encode("red<|im_end|>red")
    assert tokenizer.pad_id == tokenizer.bos_id == pad and tokenizer.stop_ids == [end, pad]


def test_stream_never_breaks_a_character(tokenizer):
    text = "a\u00e9\u4e2d\U0001f600b"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    assert "".join(tokenizer.stream(iter(ids))) == text
    assert tokenizer.decode(ids[:2]) == "a\ufffd"  # cut in the middle: said so at the end
    assert tokenizer.decode([tokenizer.size + 5]) == "\ufffd"  # a row without a token


def test_long_runs(tokenizer):
    for text in (" " * 1_000_000 + "x", "a" * 250_000, "\n" * 250_000 + "a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_cuts_change_nothing(theirs, monkeypatch):
    blank = t.byte_level(t.train_bpe(["\n \n", "\n\n", "  ", "   ", ".\n", " x", ".\n\n"])[0], {})
    spaced = "".join(random.Random(5).choices("\n\n\n   x.\u2028\x1c", k=4000))
    mixed = "".join(fuzz(600, seed=3))
    for tokenizer, text, least in ((blank, spaced, 100), (t.load_tokenizer(theirs), mixed, 1000)):
        whole = tokenizer.encode(text)
        for cut in range(least, least + 40):
            monkeypatch.setattr(t, "CUT", cut)
            portions = list(t.portions(text))
            assert len(portions) > 10 and "".join(portions) == text and max(map(len, portions)) <= cut
            assert tokenizer.encode(text) == whole
        monkeypatch.undo()


def test_llama3_pattern_from_tokenizer_json(theirs, tmp_path):
    import tokenizers

    whole = json.loads((theirs / "tokenizer.json").read_text().replace("\\\\p{N}|", "\\\\p{N}{1,3}|"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | {"normalizer": None}))
    theirs, ours = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), t.load_tokenizer(tmp_path)
    for text in [*fuzz(200), "1234567 cafe\u0301"]:
        assert ours.encode(text, special=True) == theirs.encode(text).ids


# ---- sentencepiece -------------------------------------------------------------------------------


def train_sentencepiece(folder):
    """Write tokenizer.model, of Llama's kind."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    lines = ["the red star is near the old house.", "a user asks, the assistant answers: 12 stars."] * 20
    trainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("llama"))


def test_sentencepiece(llama):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    tokenizer = t.load_tokenizer(llama)
    assert tokenizer.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.stop_ids, tokenizer.size) == (1, 0, [2], 320)
    for text in ["the red star", " the", "\nWhat", "caf\u00e9 \u4e2d\U0001f600", "a  b </s>", *fuzz(300)]:
        text = text.replace("\x00", "")
        ids = tokenizer.encode(text)
        assert ids == model.encode(text) and not {1, 2} & set(ids)
        assert tokenizer.decode(ids) == text  # the added space is taken off again


@pytest.mark.oracle
def test_sentencepiece_as_transformers_does(llama):
    """The slow, legacy way of these models' training: each text after a control token gets a space, too."""
    transformers = pytest.importorskip("transformers")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    theirs = transformers.SentencePieceBackend(vocab_file=str(llama / "tokenizer.model"), legacy=True, **names)
    tokenizer = t.load_tokenizer(llama)
    for text in fuzz(1000, seed=4):
        text = text.replace("\x00", "")
        for said in (text, f"<s>{text[:5]}</s>{text[5:]}", f"<s>[INST] {text} [/INST]</s>", f"{text}<unk>\n{text}"):
            assert tokenizer.encode(said, special=True) == theirs.encode(said), repr(said)
            assert tokenizer.encode(said) == theirs.encode(said, split_special_tokens=True), repr(said)


def test_tokenizer_model_comes_before_tokenizer_json(llama, tmp_path):
    """Llama 2's and Mistral's folders have both; their tokenizer.json is sentencepiece in a form not read here."""
    model = {"type": "BPE", "vocab": {"<unk>": 0}, "merges": []}
    whole = {"added_tokens": [{"content": "<s>", "id": 1, "special": True}], "pre_tokenizer": None, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"Mistral are read from their tokenizer\.model"):
        t.load_tokenizer(tmp_path)
    shutil.copy(llama / "tokenizer.model", tmp_path)
    one, other = t.load_tokenizer(tmp_path), t.load_tokenizer(llama)
    assert one.special == other.special and one.encode("the red star") == other.encode("the red star")


# ---- what users get wrong ------------------------------------------------------------------------

OURS = dict.fromkeys(("vocab.json", "merges.txt", "tokenizer_config.json"))  # as the fixture `ours` holds them


@pytest.mark.parametrize("files, complaint", [
    ({}, "has no tokenizer"),
    ({"vocab.json": "{"}, "vocab.json is not valid JSON"),
    ({"vocab.json": "[]"}, r"vocab.json is \[\]; a dictionary is expected"),
    ({"vocab.json": '{"a": 0}'}, "lacks 255 of the 256 bytes"),
    ({"vocab.json": '{"a": "0"}'}, "expected an integer"),
    ({"vocab.json": '{"\u4e2d": 0}'}, "not byte-level BPE"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b\n"}, "merge 'a b' has no id"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "ab\n"}, r"merge \['ab'\] has no id"),
    ({"tokenizer.json": '{"model": {"type": "WordPiece", "vocab": {}}}'}, "model.type is 'WordPiece'; one of BPE is expected"),
    ({"tokenizer.json": '{"added_tokens": [{"content": "x"}]}'}, r"tokenizer.json: added_tokens\[0\] lacks id"),
    ({"added_tokens.json": '{"x": 1}', "tokenizer.json": '{"added_tokens": [{"content": "x", "id": 2}]}'}, "two ids"),
    ({"tokenizer.model": "text"}, "not a sentencepiece model"),
    (OURS | {"merges.txt": b"#version: 0.2\n\xff \xfe\n"}, r"merge '.*' has no id"),
    (OURS | {"added_tokens.json": '{"<|im_end|>": 5}', "tokenizer_config.json": "{}"}, "same id"),
])  # fmt: skip
def test_complaints(ours, tmp_path, files, complaint):
    for name, content in files.items():
        content = (ours / name).read_bytes() if content is None else content
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=complaint):
        t.load_tokenizer(tmp_path)


def test_a_token_without_an_embedding(ours, tokenizer, tmp_path):
    """Llama-2's first release lists such a <pad>, which nothing needs."""
    size, folder = tokenizer.size, tmp_path / "a"
    shutil.copytree(ours, folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    assert t.load_tokenizer(folder).size == size
    (folder / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(ValueError, match=rf"'<\|im_end\|>' has the id {size - 1}, but .*vocab_size is {size - 1}"):
        t.load_tokenizer(folder)
