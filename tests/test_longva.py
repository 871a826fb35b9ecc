"""longva.py against transformers' Qwen2 and Llama, against slow loops, and as a program that answers questions.

Random weights everywhere, biases and norms too: a forgotten term must show.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import longva
import ring
import unires
from assets import make_film
from clip import ClipConfig
from data import chat, flags, memory, tokenizer, video, weights
from data.config import to_dict
from longva import KVCache, LMConfig, LongVA, LongVAConfig, rope
from tests.ranks import ALONE
from tests.test_data_video import film
from unires import Layout

ROOT = Path(longva.__file__).parent
WORDS = ROOT / "data" / "tiny" / "tokenizer"
WIDE = "three for one, wide heads, tied"
SIZES = {  # V, D, F, layers, H, G
    "one key head for seven": LMConfig(37, 28, 44, 2, 7, 1),
    WIDE: LMConfig(50, 36, 40, 3, 6, 2, head_dim=10, rope_theta=1e9, tie_word_embeddings=True),
    "narrow heads, base of 1e9": LMConfig(41, 48, 36, 2, 4, 4, head_dim=6, rope_theta=1e9),
    "one layer": LMConfig(33, 16, 24, 1, 2, 1, rope_theta=1e4, tie_word_embeddings=True),
}
FAR = 400_000  # about the 2,800th frame of 144 tokens; the paper goes to 3,000 frames
torch.set_num_threads(1)  # nothing here is worth a second thread


def vary(model, seed=0):
    """Every parameter random, about as large as a trained one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        wide = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
        p.data.normal_(0, 1.5 * wide, generator=generator).add_("norm" in name and name.endswith("weight"))
    return model


def lm(name=WIDE, **changes):
    return vary(longva.LM(replace(SIZES[name], **changes)))


def twins(config):
    """Transformers' model and ours with the same weights."""
    hf = pytest.importorskip("transformers")
    rest = asdict(config) | {"head_dim": config.head_width}
    rest["rope_parameters"] = {"rope_type": "default", "rope_theta": rest.pop("rope_theta")}
    if rest.pop("attention_bias"):  # what Qwen2 is, and has no word for
        theirs = hf.Qwen2ForCausalLM(hf.Qwen2Config(**rest))
    else:
        theirs = hf.LlamaForCausalLM(hf.LlamaConfig(**rest))
    ours = longva.LM(config)
    weights.fill_from(ours, vary(theirs.eval()).named_parameters())
    return theirs, ours


def scores(model, ids, first=0):
    return model.logits(model.model(model.embed(ids), torch.arange(first, first + ids.shape[1])))


def some_ids(config, B=2, T=11, seed=0):
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- 1 the decoder, and transformers' ------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("bias", [True, False], ids=["Qwen2", "Llama"])
@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_equals_transformers(name, bias):
    theirs, ours = twins(replace(SIZES[name], attention_bias=bias))
    ids = some_ids(ours.config)
    for first in (0, FAR):
        want = theirs(ids, position_ids=torch.arange(first, first + 11)[None]).logits
        assert_close(scores(ours, ids, first), want, atol=1e-5, rtol=1e-5)


@pytest.mark.oracle
def test_bfloat16_is_no_worse_than_transformers():
    """Both round differently; measured against float32, ours may err at most 1.5 times as much, and 5 %."""
    theirs, ours = twins(SIZES[WIDE])
    ids = some_ids(ours.config)
    with torch.no_grad():
        exact = theirs(ids).logits
        theirs_off = (theirs.bfloat16()(ids).logits.float() - exact).norm()
        got = scores(ours.bfloat16(), ids)
    assert got.dtype == torch.float32  # logits leave the head as bfloat16 and are widened
    assert (got - exact).norm() <= min(1.5 * theirs_off, 0.05 * exact.norm())


@pytest.mark.oracle
@pytest.mark.parametrize("name", [WIDE, "one key head for seven"])
def test_loss_and_all_gradients_equal_transformers(name):
    theirs, ours = twins(SIZES[name])
    ids, targets = some_ids(ours.config), some_ids(ours.config, seed=1)
    targets[0, :4] = chat.IGNORE
    want = F.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    want.backward()
    lost, count = ours(ids, torch.arange(11), targets)
    assert_close(lost.sum(), want, atol=1e-4, rtol=1e-6)
    assert count.tolist() == [7, 11]
    lost.sum().backward()
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    assert grads.keys() == {key for key, _ in ours.named_parameters()}
    for key, p in ours.named_parameters():
        assert_close(p.grad, grads[key], atol=2e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_rope_is_near_the_exact_angles_and_made_in_float32():
    """Float32 rounds a frequency by 2**-25 or so: at 400,000 that is an angle of at most 0.05, not of 1000."""
    pos = torch.tensor([0, 1, 257, 65_537, FAR - 1])
    cos, sin = rope(pos, 128, 1e9)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (5, 128)
    turn = 1e9 ** (-torch.arange(64, dtype=torch.float64) / 64)
    angle = (pos.double()[:, None] * turn).repeat(1, 2)
    assert_close(cos.double(), angle.cos(), atol=0.05, rtol=0)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(64)  # `rotate` adds the first half's with a minus
    assert_close((sign * sin).double(), angle.sin(), atol=0.05, rtol=0)
    assert_close(cos[:3].double(), angle[:3].cos(), atol=3e-5, rtol=0)


@pytest.mark.parametrize("checkpointing, tile, offload", [
    ("full", 0, False), ("selective", 0, False), ("none", 3, False), ("full", 4, True), ("selective", 2, True),
])  # fmt: skip
def test_saving_memory_changes_nothing(check_shapes, checkpointing, tile, offload):
    """Every way to keep less for backward gives the plain way's loss and gradients."""
    ids = some_ids(SIZES[WIDE], 2, 13)
    grads = []
    for how in ("none", 0, False), (checkpointing, tile, offload):
        model = vary(lm(), seed=3).double()
        model.model.checkpointing, _, model.model.offload_activations = how
        for block in model.model.layers:
            block.mlp.tile = how[1]
        lost, count = model(ids[:, :-1], torch.arange(12), ids[:, 1:])
        (lost.sum() / count.sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()} | {"loss": lost})
    assert_close(*grads, atol=1e-14, rtol=1e-12)


# ---- 2 the cache ---------------------------------------------------------------------------------


def read(model, x, cache, cuts):
    """Hidden states of x, read into the cache in portions of so many tokens."""
    parts = []
    for part in x.split(cuts, dim=1):
        pos = torch.arange(cache.length, cache.length + part.shape[1])
        parts.append(model.model(part, pos, cache.attend))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", list(SIZES)[:3])
@pytest.mark.parametrize("cuts", [[12], [3, 1, 2, 1, 1, 4], [1, 11]], ids=str)
@torch.no_grad()
def test_cache_in_portions_equals_one_pass(name, cuts):
    model = lm(name).double()
    x, other = (model.embed(some_ids(model.config, T=12, seed=seed)) for seed in (0, 1))
    cache = KVCache(model.config, 2, 15, x)
    got = read(model, x, cache, cuts)
    assert got.dtype == torch.float64 and cache.length == 12
    assert_close(got, model.model(x, torch.arange(12)), atol=1e-12, rtol=1e-12)
    for kept in (4, 0, 8):  # setting the length back forgets what came after
        cache.length = kept
        x = torch.cat([x[:, :kept], other[:, kept:]], dim=1)
        want = model.model(x, torch.arange(12))[:, kept:]
        assert_close(read(model, x[:, kept:], cache, [2, 10 - kept]), want, atol=1e-12, rtol=1e-12)
    with pytest.raises(AssertionError, match="a cache for 15 tokens cannot hold 16"):
        read(model, x, cache, [3, 1, 8])


@torch.no_grad()
def test_branches_share_a_beginning_and_then_differ(check_shapes):
    model = lm().double()
    whole = model.embed(some_ids(model.config, 1, 9))
    trunk = KVCache(model.config, 1, 9, whole)
    read(model, whole[:, :6], trunk, [6])
    ends = model.embed(some_ids(model.config, 3, 5, seed=1))
    branch = trunk.branch(4, 3, 5)
    got = read(model, ends, branch, [2, 1, 2])
    assert branch.length == 9 and trunk.length == 6
    for row, end in enumerate(ends):
        x = torch.cat([whole[:, :4], end[None]], dim=1)
        want = model.model(x, torch.arange(9))[0, 4:]
        assert_close(got[row], want, atol=1e-12, rtol=0)
    twig = branch.branch(7, 3, 2)  # each row keeps its own past
    assert_close(read(model, ends[:, 3:], twig, [1, 1]), got[:, 3:], atol=1e-12, rtol=0)
    want = model.model(whole, torch.arange(9))[:, 6:]  # the trunk has noticed nothing
    assert_close(read(model, whole[:, 6:], trunk, [1, 2]), want, atol=1e-12, rtol=0)


# ---- 3 the eye in the model ----------------------------------------------------------------------

EYE = ClipConfig(20, 24, 2, 2, 7, 28)  # grids of 28 pixels: 16 patches, 4 tokens


def longva_model(scheme="unires", rule=None, **changes):
    sizes = replace(SIZES[WIDE], **{"tie_word_embeddings": False, **changes})
    return vary(LongVA(LongVAConfig(sizes, EYE, scheme, rule or {"unires": "canvas", "anyres": "anyres"}[scheme])))


def grids(n, seed=0):
    return torch.randn(n, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def slowly(model, pixels, layout):
    """Tokens of one picture, grid by grid; pooled with four loops where nothing ends its rows."""
    first, _, last = model.model.mm_projector
    features = []
    for one in pixels if pixels.is_floating_point() else unires.normalise(pixels):
        z = model.tower.hidden(one[None], 1)[0, 1:]
        features.append(F.linear(F.gelu(F.linear(z, first.weight, first.bias)), last.weight, last.bias))
    if layout.scheme == "anyres":
        return unires.anyres(torch.stack(features), layout.rows, layout.cols, model.model.image_newline, layout.unpad)
    return torch.stack([
        (f[8 * y + 2 * x] + f[8 * y + 2 * x + 1] + f[8 * y + 2 * x + 4] + f[8 * y + 2 * x + 5]) / 4
        for f in features for y in range(2) for x in range(2)
    ])  # fmt: skip


@torch.no_grad()
def test_see_is_each_picture_on_its_own(check_shapes):
    """Also with a video in between; the next tests see pictures of UniRes."""
    model, pixels = longva_model("anyres"), grids(11)
    layouts = [Layout(1, 2, "anyres", (60, 28)), Layout(1, 3), Layout(2, 2, "anyres")]
    parts = pixels.split([3, 3, 5])
    want = [slowly(model, part, layout) for part, layout in zip(parts, layouts)]
    assert [len(one) for one in want] == [layout.tokens(EYE.patches) for layout in layouts]
    assert_close(model.encode_images(pixels, layouts), torch.cat(want), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_watch_is_see_of_all_frames_at_once(check_shapes):
    model, film = longva_model(), grids(5)
    want = model.encode_images(film, [Layout(1, 5)])
    for batch in (1, 2, 5, 64):
        parts = list(longva.encode_video(model, iter(film), batch))
        assert [len(part) for part in parts[:-1]] == [4 * batch] * (len(parts) - 1)
        assert_close(torch.cat(parts), want, atol=1e-5, rtol=1e-5)
    assert list(longva.encode_video(model, [])) == []
    # Lost frames leave a gap, so that each part stays at its place in the film; so does a part of which all is lost.
    parts = longva.encode_video(model, [film[0], None, None, None, film[4]], 2)
    parts = ring.gather_round_robin(parts, model.lm_head.weight[:0], 8, 4, ALONE)
    assert [len(part) for part in parts] == [4, 0, 4, 0]


def test_embed_puts_each_visual_token_in_its_place():
    model, places = longva_model(), torch.tensor([1, 2, 5, 6, 9])  # of the flattened batch
    ids = some_ids(model.config.lm, 2, 6).clamp(min=1)
    ids.view(-1)[places] = chat.IMAGE
    visual_tokens = torch.randn(5, 36, dtype=torch.float64, requires_grad=True)
    x, table = model.embed(ids, visual_tokens), model.model.embed_tokens.weight
    want = table[ids.clamp(min=0)].flatten(0, 1)
    want[places] = visual_tokens.float()
    assert torch.equal(x.flatten(0, 1), want)
    assert torch.equal(model.embed(ids, visual_tokens, places), x)  # places that the collator computed
    x.sum().backward()
    assert (visual_tokens.grad == 1).all()
    assert not table.grad[0].any(), "an image place trained the embedding of token 0"


def test_forward_is_the_decoder_on_what_was_read_and_seen(check_shapes):
    """Two rows with three pictures."""
    model, pos, pixels = longva_model(), torch.arange(16), grids(5)
    ids, targets = some_ids(model.config.lm, 2, 16), some_ids(model.config.lm, 2, 16, seed=1)
    ids[0, 2:10] = ids[1, 0:4] = ids[1, 5:13] = chat.IMAGE
    targets[ids == chat.IMAGE] = chat.IGNORE
    got, count = model(ids, pos, targets, pixels, [Layout(1, 2), Layout(1, 1), Layout(2, 1)])
    x = model.model.embed_tokens(ids.clamp(min=0))
    rows = slowly(model, pixels, Layout(1, 5))
    x[0, 2:10], x[1, 0:4], x[1, 5:13] = rows[:8], rows[8:12], rows[12:]
    blind = longva.LM(model.config.lm)  # the same weights without an eye
    blind.load_state_dict({k: v for k, v in model.state_dict().items() if k in blind.state_dict()})
    want, _ = longva.plain_nll(blind.model(x, pos), blind.lm_head.weight, targets)
    assert_close(got, want, atol=1e-4, rtol=1e-5)
    assert torch.equal(count, (targets != chat.IGNORE).sum(1).float())
    got.sum().backward()
    for name, p in model.named_parameters():  # what stands behind the chosen layer of the tower is never run
        assert (p.grad is None) == any(part in name for part in ("encoder.layers.1.", "post_layernorm")), name


def test_a_batch_of_text_alone():
    model = longva_model()
    ids, targets = some_ids(model.config.lm), some_ids(model.config.lm, seed=1)
    want, _ = longva.LM.forward(model, ids, torch.arange(11), targets)
    got, _ = model(ids, torch.arange(11), targets, grids(0), [])
    assert torch.equal(got, want)
    got.sum().backward()
    assert model.model.mm_projector[0].weight.grad is not None  # ranks that shard the projector wait for it


# ---- 4 weights in and out ------------------------------------------------------------------------


def tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [lm, lambda: longva_model("anyres")], ids=["LM", "LongVA"])
def test_fresh_depends_on_the_seed_alone(make):
    real = make()
    with torch.device("meta"):
        meta = type(real)(real.config)
    seeds = (real, 3), (meta, 3), (real, 4)
    first, second, other = (dict(weights.init_weights(model, seed)) for model, seed in seeds)
    assert first.keys() == second.keys() == dict(real.named_parameters()).keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) and tensor.shape == real.get_parameter(name).shape, name
        if name.endswith("bias") or "norm" in name:
            assert (tensor == float(name.endswith("weight"))).all(), name
        else:
            wide = tensor[0].numel() if tensor.ndim > 1 else len(tensor)
            want = wide**-0.5 if "vision_tower" in name or "mm_projector" in name or "image_newline" in name else 0.02
            assert tensor.std().item() == pytest.approx(want, rel=0.4), name
            assert not torch.equal(tensor, other[name]), name


def test_a_tied_head_may_be_in_the_file():
    tied = lm()
    weights.fill_from(tied, {**tensors(tied), "lm_head.weight": torch.ones(50, 36)}.items())
    assert not (tied.lm_head.weight == 1).all()


def saved(folder, model, **rest):
    weights.write(folder, model.named_parameters(), to_dict(model.config, "float32"), **rest)
    return folder


@pytest.mark.parametrize("make", [
    lm, lambda: lm("one key head for seven", attention_bias=False), lambda: longva_model(rule="floor"),
    lambda: longva_model("anyres", attention_bias=False, tie_word_embeddings=True),
], ids=["LM", "Llama", "floor", "anyres, tied, on Llama"])  # fmt: skip
def test_round_trip(tmp_path, make):
    model = make()
    again = longva.load(saved(tmp_path, model, shard_bytes=20_000))
    assert type(again) is type(model) and not again.training
    sizes, want = model.model.config, tensors(model)
    sizes = replace(sizes, head_dim=sizes.head_width)
    assert again.config == (sizes if not isinstance(model, LongVA) else replace(model.config, lm=sizes))
    assert tensors(again).keys() == want.keys()
    for name, p in again.named_parameters():
        assert torch.equal(p, want[name]) and p.dtype == torch.float32 and not p.requires_grad, name
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == sizes.tie_word_embeddings
    assert next(longva.load(tmp_path, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.oracle
@pytest.mark.parametrize("name, bias", [(WIDE, True), ("one key head for seven", False)])
@torch.no_grad()
def test_transformers_loads_our_folder_and_we_theirs(tmp_path, name, bias):
    hf = pytest.importorskip("transformers")
    ours = lm(name, attention_bias=bias)
    theirs = hf.AutoModelForCausalLM.from_pretrained(saved(tmp_path, ours), dtype=torch.float32)
    assert type(theirs).__name__ == ("Qwen2ForCausalLM" if bias else "LlamaForCausalLM")
    ids = some_ids(ours.config)
    want = scores(ours, ids)
    assert_close(theirs(ids).logits, want, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "back")
    assert_close(scores(longva.load(tmp_path / "back"), ids), want, atol=1e-6, rtol=0)


# ---- 5 answering ---------------------------------------------------------------------------------


@torch.no_grad()
def answer(model, x, count, stop=()):
    """Greedy answer with everything computed again for each token."""
    ids = []
    while len(ids) < count:
        h = model.model(x, torch.arange(x.shape[1]))
        token = model.lm_head(h[0, -1]).argmax()
        if token.item() in stop:
            break
        ids.append(token.item())
        x = torch.cat([x, model.model.embed_tokens(token[None, None])], dim=1)
    return ids


@pytest.fixture(scope="module")
def asked():
    """A model, an embedded prompt with a picture, the ten tokens that follow, and a late one that is new there."""
    model = vary(longva_model(), seed=1).double()
    ids = some_ids(model.config.lm, 1, 13)
    ids[0, 3:11] = chat.IMAGE
    with torch.no_grad():
        x = model.embed(ids, model.encode_images(grids(2), [Layout(1, 2)]))
    said = answer(model, x, 10)
    assert len(set(said)) > 4, "too dull an answer to test with"
    return model, x, said, next(token for token in reversed(said) if said.index(token) > 2)


@pytest.mark.parametrize("chunk", [1, 4, 4096])
def test_generate_equals_computing_all_again(asked, chunk, monkeypatch):
    """However an answer ends; and the next turn's answer is that of reading everything again."""
    model, x, said, last = asked
    monkeypatch.setitem(memory.CHUNK, "cpu", chunk)
    more = model.embed(some_ids(model.config.lm, 1, 5))
    for stop_ids, most, want in [
        ((), 10, said), ((), 4, said[:4]), ((), 0, []),
        ([last, 10**6], 10, said[: said.index(last)]), ({said[0]}, 10, []),
    ]:  # fmt: skip
        cache = KVCache(model.config.lm, 1, x.shape[1] + 20, x)
        assert list(longva.generate(model, x, cache, stop_ids, most)) == want
        assert cache.length == x.shape[1] + len(want)
        so_far = torch.cat([x, model.embed(torch.tensor([want], dtype=torch.int64)), more], dim=1)
        assert list(longva.generate(model, more, cache, (), 5)) == answer(model, so_far, 5)
    cache.length = 0
    stream = longva.generate(model, x, cache, ())
    assert [next(stream), next(stream)] == said[:2]
    assert cache.length == x.shape[1] + 1, "computed more than was asked for"
    assert not any(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_a_prompt_is_read_as_it_comes(check_shapes, asked, monkeypatch):
    """Pictures and films in parts, text between: what the cache holds then is that of one pass."""
    model, *_ = asked
    monkeypatch.setitem(memory.CHUNK, "cpu", 3)
    seen = model.encode_images(grids(5), [Layout(1, 5)])
    text = some_ids(model.config.lm, 1, 9)[0].tolist()
    ids = [*text[:3], chat.IMAGE, *text[3:5], chat.IMAGE, *text[5:]]
    whole = [*text[:3], *[chat.IMAGE] * 12, *text[3:5], *[chat.IMAGE] * 8, *text[5:]]
    want = answer(model, model.embed(torch.tensor([whole]), seen), 5)
    cache = KVCache(model.config.lm, 1, 40, seen)
    rest = longva.prefill_prompt(model, ids, [iter([seen[:4], seen[4:12]]), [seen[12:]]], cache)
    assert rest == text[5:] and cache.length == 25
    for _ in range(2):  # asked twice about the same pictures
        cache.length = 25
        assert list(longva.generate(model, model.embed(torch.tensor([rest])), cache, [], 5)) == want


# ---- 6 the program -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LongVA of random weights with the shipped tokenizer, some pictures and a film in a folder of its own."""
    home = tmp_path_factory.mktemp("longva")
    rows = tokenizer.load_tokenizer(WORDS).size + 7  # of the embedding: more than tokens, as in Qwen2
    weights.copy_tokenizer(WORDS, saved(home / "model", longva_model(vocab_size=rows)))
    weights.copy_tokenizer(WORDS, saved(home / "blind", lm(vocab_size=rows)))
    (home / "frames").mkdir()

    def noise(i):
        return Image.fromarray(np.random.RandomState(i).randint(0, 255, (48, 64, 3), np.uint8))

    for i in range(4):
        noise(i).save(home / "frames" / f"{i}.png")
    film(home / "film.mp4", [i / 5 for i in range(4)], picture=noise)
    return home


def asking(folder, **settings):
    settings = {"weights": folder / "model", "max_tokens": 8, "device": "cpu"} | settings
    longva.main(longva.Config(**settings))


def expected(folder, questions, shown):
    """What must be printed: each answer by the loop without a cache, from all ids so far.

    shown: (pixels, layout) of each picture, or of the film.
    """
    words, model = tokenizer.load_tokenizer(WORDS), longva.load(folder / "model")
    visual_tokens = [slowly(model, pixels, layout) for pixels, layout in shown]
    ids, text = chat.prompt(words, questions[0], [len(one) for one in visual_tokens]), ""
    for n, question in enumerate(questions):
        ids += chat.follow_up(words, question) if n else []
        said = answer(model, model.embed(torch.tensor([ids]), torch.cat(visual_tokens)), 8, words.stop_ids)
        ids, text = ids + said, text + words.decode(said) + "\n"
    return text


def expected_of_film(folder, *questions, film="frames", count=3):
    pixels = unires.frames([picture for _, picture in video.frames(folder / film, count=count)], 28, "crop")
    return expected(folder, questions, [(pixels, Layout(1, count))])


def test_the_commands_of_the_docstring_mean_what_they_say():
    """A flag that takes several files would swallow a question that follows it."""
    for words in map(shlex.split, re.findall("python longva.py (.*)", longva.__doc__)):
        cfg = flags.parse(longva.Config, argv=words)
        assert len(cfg.image) + bool(cfg.video) == 1 and cfg.question in words


def test_asks_about_pictures(check_shapes, folder, capsys):
    files = [folder / "frames" / f"{i}.png" for i in (2, 0, 1)]
    question = "<image><image>and<image>what is\nthere?"
    asking(folder, question=question, image=tuple(files))
    shown = [unires.preprocess(Image.open(file), 28, "canvas") for file in files]
    assert capsys.readouterr().out == expected(folder, [question], shown)


@pytest.mark.parametrize("frames", [3, None])
def test_asks_about_a_film(check_shapes, folder, capsys, frames):
    """Of 3 of its 4 frames, or of a short film whole."""
    asking(folder, question="how many?", video=folder / "film.mp4", frames=frames)
    assert capsys.readouterr().out == expected_of_film(folder, "how many?", film="film.mp4", count=frames or 4)


def test_the_shipped_model_answers_about_the_shipped_film(tmp_path, capsys):
    """The film as it is shipped, the same film with another digit, made again; three lines of Python."""
    house = "Which number is on the house?"
    make_film.main(tmp_path / "film.mp4", 7)
    capsys.readouterr()
    for path, frames, number in [(make_film.FILM, 100, 4), (tmp_path / "film.mp4", 32, 7)]:
        assert path.stat().st_size < 120_000
        longva.main(longva.Config(house, video=path, frames=frames, device="cpu"))
        assert capsys.readouterr().out == f"{number}\n"
    model = longva.load(ROOT / "data" / "tiny" / "longva")
    assert longva.answer(model, house, video=make_film.FILM, frames=32) == "4"
    star = ROOT / "assets" / "star.png"
    for images in ([star], star, str(star)):
        assert longva.answer(model, "Which number is on the star?", images=images) == "7"


def test_a_name_in_the_local_cache_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (snapshots := tmp_path / "models--lab--toy" / "snapshots").mkdir(parents=True)
    (snapshots / "1").symlink_to(ROOT / "data" / "tiny" / "base")
    assert longva.load("lab/toy").folder == snapshots / "1"
    with pytest.raises(ValueError, match="there is no folder lab/other, nor such a model in"):
        longva.load("lab/other")


def test_logits_that_are_not_finite_end_an_answer(folder):
    """Else the argmax of NaN is token 0, and the answer "!!!!"."""
    model = longva.load(folder / "model")
    model.model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the logits are not finite"):
        longva.answer(model, "how many?", images=[folder / "frames" / "0.png"])


def test_a_config_of_a_larger_model_takes_no_memory(tmp_path):
    file = saved(tmp_path, lm()) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 2**18, "vocab_size": 2**24}))
    with pytest.raises(ValueError, match=r"describes 4,.* parameters, but the weight files have .* bytes"):
        longva.load(tmp_path)


def test_an_input_far_beyond_the_trained_length_gets_a_remark(capsys):
    chat.note_length(2048, 2048)
    assert not capsys.readouterr().err
    chat.note_length(43_200, 2048)
    assert "43,200 tokens, but config.json says 2,048" in capsys.readouterr().err


def test_a_chat_reads_the_film_once_and_goes_on_after_mistakes(folder, monkeypatch, capsys):
    looked, see = [], LongVA.encode_images
    monkeypatch.setattr(LongVA, "encode_images", lambda *args: looked.append(1) or see(*args))
    monkeypatch.setattr(chat, "CHAT", 90)
    typed = "what <image>?\n\nwhy?\n" + "why? " * 99 + "\nwh\udcffy?\nwhy?\nExit\nwhy?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    asking(folder, question="how many?", chat=True, video=folder / "frames", frames=3)
    out, err = capsys.readouterr()
    assert "<image> cannot be asked for in a chat" in err and "tokens do not fit in" in err and "Ctrl-D ends" in err
    assert out == expected_of_film(folder, "how many?", "why?", "wh?y?", "why?") and len(looked) == 1


def test_ranks_give_the_same_answers(folder, tmp_path, monkeypatch, capsys):
    """Under torchrun frames are dealt out, of 60 none to the third rank, the cache is spread, a chat is typed once."""
    for i in range(60):
        Image.fromarray(np.random.RandomState(i).randint(0, 255, (32, 40, 3), np.uint8)).save(tmp_path / f"{i:02}.png")
    words = f"--weights {folder / 'model'} --video {tmp_path} --frames 60 --chat --max-tokens 12 --device cpu"
    words, typed = ["how many?", *words.split()], "and then?\nwhy?\n"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "longva.py"]
    how = {"input": typed, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "cwd": ROOT, "timeout": 300}
    done = subprocess.run([sys.executable, *torchrun, *words], **how, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    longva.main(flags.parse(longva.Config, argv=words))
    said = capsys.readouterr().out
    assert done.stdout == said and len(set(said.split("\n"))) >= 3


def test_how_to_draw_comes_from_the_folder_or_the_flags(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "model")
    drawn = {"do_sample": True, "temperature": 5.0, "top_k": 0}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(drawn))
    said = []
    for flags_ in ({}, {}, {"seed": 1}, {"temperature": 0.0}):
        asking(folder, question="how many?", video=folder / "frames", frames=3, weights=tmp_path / "model", **flags_)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2] and said[3] == expected_of_film(folder, "how many?") != said[0]


@pytest.mark.parametrize("settings, message", [
    ({}, "either --image FILE or --video"), ({"image": ("frames/0.png",), "video": "frames"}, "not both"),
    ({"image": ("frames/9.png",)}, "frames/9.png: no such picture file"),
    ({"video": "none.mp4"}, "none.mp4: no such video file"),
    ({"video": "film.mp4", "frames": 32}, r"film\.mp4: has 4 frames, but 32 were asked for"),
    ({"image": ("frames/0.png",), "weights": "blind"}, "blind is a language model and cannot see"),
    ({"image": ("frames/0.png",), "weights": "none"}, "none is not a folder|none.* missing|no tokenizer"),
    ({"image": ("frames/0.png",), "device": "cuda"}, "need one GPU each, but torch sees 0; choose --device cpu"),
    ({"video": "frames", "fps": 1.0, "frames": 3}, "--fps and --frames both say"),
    ({"image": ("frames/0.png",), "plan": True}, "--plan counts frames"),
    ({"video": "frames", "frames": 0}, "--frames 0 makes no sense; give 1 or more"),
    ({"video": "frames", "max_tokens": 0}, "--max-tokens 0 makes no sense"),
    ({"video": "frames", "fps": 0.0}, "--fps 0.0 makes no sense"),
    ({"image": ("frames/0.png",), "question": __file__}, "is a file where the question should stand"),
    ({"image": ("frames/0.png",), "max_tokens": 10**12}, "tokens take .* GB can be had; give fewer"),
    ({"image": ("frames/0.png",), "question": "<image> or <image>?"}, "2 placeholder.* for 1 picture"),
])  # fmt: skip
def test_user_errors_are_one_sentence(folder, settings, message):
    paths = {name: folder / settings[name] for name in ("video", "weights") if name in settings}
    if "image" in settings:
        paths["image"] = tuple(folder / file for file in settings["image"])
    with pytest.raises(ValueError, match=message) as error:
        asking(folder, **{**settings, **paths})
    assert "\n" not in str(error.value)
