"""Token files: every sequence once per epoch, and resuming by number alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import text


@pytest.fixture
def tokens(tmp_path):
    """Opens a token file of the ids 0 ... n - 1, so that an id tells its place."""

    def make(n, dtype="uint16"):
        np.save(tmp_path / "tokens.npy", np.arange(n, dtype=dtype))
        return text.open_tokens(tmp_path / "tokens.npy")

    return make


# ---- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", text.DTYPES)
def test_a_window_is_consecutive_ids_and_their_followers(tokens, dtype):
    ids_BS, targets_BS = text.windows(tokens(31, dtype), seq_len=5, rows=4, seed=0, micro_batch=0)
    assert ids_BS.shape == targets_BS.shape == (4, 5) and ids_BS.dtype == targets_BS.dtype == torch.int64
    assert torch.equal(ids_BS, ids_BS[:, :1] + torch.arange(5)) and torch.equal(targets_BS, ids_BS + 1)
    ids_BS.zero_()
    assert (targets_BS > 0).all()  # their own memory


@pytest.mark.parametrize("n, whole", [(31, 6), (35, 6), (36, 7)])
def test_every_window_once_per_epoch(tokens, n, whole):
    ids = tokens(n)
    made = [torch.cat([text.windows(ids, 5, 2, seed, part)[0] for part in range(2 * whole)]) for seed in (3, 4)]
    firsts, other = (ids_BS[:, 0].tolist() for ids_BS in made)
    epochs = [firsts[i : i + whole] for i in range(0, 4 * whole, whole)]
    assert all(sorted(epoch) == list(range(0, 5 * whole, 5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and other != firsts  # a new order each time


def test_any_micro_batch_can_be_made_alone(tokens):
    """Resuming starts at a micro-batch past the first epoch, in a process that has seen nothing before."""
    ids = tokens(31)
    straight = [text.windows(ids, 5, 2, 9, part) for part in range(12)]
    text.permutation.cache_clear()
    for part in (11, 7, 4):
        assert all(torch.equal(a, b) for a, b in zip(straight[part], text.windows(ids, 5, 2, 9, part)))
    halves = torch.cat([text.windows(ids, 5, 1, 9, part)[0] for part in range(24)])
    assert torch.equal(torch.cat([ids_BS for ids_BS, _ in straight]), halves)  # rows do not matter


def test_a_short_file_is_refused(tokens):
    assert text.windows(tokens(6), 5, 1, 0, 0)[1].tolist() == [[1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match=r"tokens.npy holds 5 tokens, expected at least 6"):
        text.windows(tokens(5), 5, 1, 0, 0)


@pytest.mark.parametrize("ids, dtype, largest", [
    ([3, 65535, 0], "uint16", 65535), ([1, 2, 70000], "uint32", 70000), ([1, -1], "int32", 2**32 - 1),
])  # fmt: skip
def test_largest_id(ids, dtype, largest):
    assert text.largest_id(np.array(ids, dtype), block=2) == largest


@pytest.mark.parametrize("content, complaint", [
    (None, "is no file"),
    (b"", "is not a token file"),
    (np.arange(0, dtype=np.uint16), "holds no tokens"),
    (np.zeros((2, 3), np.uint16), r"holds uint16\[2, 3\]"),
    (np.arange(3), r"holds int64\[3\]"),
    (np.arange(3, dtype=">u2"), "holds >u2"),
    (np.array([{}], dtype=object), "is not a token file"),
])  # fmt: skip
def test_what_is_no_token_file(tmp_path, content, complaint):
    if isinstance(content, bytes):
        (tmp_path / "odd.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "odd.npy", content)
    with pytest.raises(ValueError, match=rf"odd\.npy .*{complaint}"):
        text.open_tokens(tmp_path / "odd.npy")


def test_any_damage_of_the_header_is_a_sentence(tmp_path):
    """300 mutations of an .npy header: a ValueError of at most 300 characters, or another array."""
    np.save(file := tmp_path / "t.npy", np.arange(1000, dtype=np.uint16))
    whole, rng, refused = file.read_bytes(), np.random.default_rng(0), 0
    file.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"t\.npy is not a token file"):
        text.open_tokens(file)
    for _ in range(300):
        raw = bytearray(whole)
        for at in rng.integers(0, 80, rng.integers(1, 4)):
            raw[at] = rng.choice([rng.integers(256), *b"\0'\"()[]{},:\\\n9"])
        file.write_bytes(raw)
        try:
            text.open_tokens(file)
        except ValueError as error:
            assert "t.npy" in str(error) and len(str(error).replace(str(tmp_path), "")) <= 300
            refused += 1
    assert refused > 150


def test_the_training_script_reads_it(tmp_path):
    import train_text

    np.save(tmp_path / "t.npy", np.arange(100, dtype=np.uint16))
    cfg = train_text.Config(corpus=str(tmp_path / "t.npy"), seq_len=8, batch=2)
    ids_BS, targets_BS, starts = train_text.make_batches(cfg, SimpleNamespace(size=100))(7)
    assert ids_BS.shape == (2, 8) and torch.equal(targets_BS, ids_BS + 1) and starts is None
    with pytest.raises(ValueError, match=r"token 99, but the model's tokenizer has 99"):
        train_text.make_batches(cfg, SimpleNamespace(size=99))
