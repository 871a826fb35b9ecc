"""Text to token ids and back, for every language model of the paper.

What      Qwen2's byte-level BPE (and Llama 3's, which differs in one pattern) through tiktoken; Llama's and Mistral's
          `tokenizer.model` through sentencepiece; a small BPE trainer for the tiny model's vocabulary.
Paper     Sec. 3.1 (Qwen2-7B-Instruct as the language model), Fig. 4 (the baselines, which need sentencepiece).
Run       imported; `load_tokenizer("Qwen2-7B-Instruct").encode("a needle")`
Dimensions  none
Differs   Text is parsed for control tokens only with `special=True`; Hugging Face always does, so that a caption with
          "<|im_end|>" in it ends the turn. A word of more than 50,000 characters may be cut: tiktoken's regex engine
          overflows its stack on a million spaces.
"""

import codecs
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import tiktoken

from data.flags import from_json, read_json, short

QWEN2_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # in the order of their ids
# How text falls into words before BPE; a token never crosses a word's border. Qwen2: one token per digit.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

# The names of a control token in different families: the first one that the vocabulary has.
PAD = ("<|endoftext|>", "<|end_of_text|>", "<pad>", "<unk>")
BOS = ("<|begin_of_text|>", "<s>", "<|endoftext|>")  # Qwen2 has none: its config names <|endoftext|>
STOP = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")

ID = {"least": 0, "most": 2**20}  # of a token
CUT = 100_000  # characters given to tiktoken at once
BORDER = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= )")  # always a border of two words, in both patterns


# ---- bytes as visible characters: GPT-2 files write a token this way -----------------------------


def byte_characters() -> list[str]:
    """The character that stands for each byte: printable ones for themselves, the others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


CHARACTER = byte_characters()
BYTE = {c: b for b, c in enumerate(CHARACTER)}


def gpt2_spelling(token: bytes) -> str:
    """A token as vocab.json writes it: b" star" is a G with a dot above, then "star"."""
    return "".join(CHARACTER[b] for b in token)


# ---- the tokenizer -------------------------------------------------------------------------------


class Tokenizer:
    """Token ids of one vocabulary.

    special: dict[str, int], the control tokens; size: the largest id + 1, the rows that embeddings need at
    least; pad_id; bos_id: the document separator (Sec. 3.1); stop_ids: an answer ends at any of them.
    """

    def __init__(self, ordinary: Callable[[str], list[int]], pieces: dict[int, bytes], special: dict[str, int]):
        """ordinary: encodes text without control tokens; pieces: the bytes of each id that it can return."""
        self.ordinary = ordinary
        self.special = special
        self.pieces = {**pieces, **{i: s.encode() for s, i in special.items()}}
        self.size = max(self.pieces) + 1
        self.pad_id = next((special[s] for s in PAD if s in special), 0)
        self.bos_id = next((special[s] for s in BOS if s in special), self.pad_id)
        self.stop_ids = [special[s] for s in STOP if s in special]
        names = sorted(special, key=len, reverse=True)  # a longer name wins over its own beginning
        self._control = re.compile("(" + ("|".join(map(re.escape, names)) or "(?!)") + ")")  # (?!): nothing

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids; special: control tokens in `text` become their ids (else they are ordinary text).

        No id is added in front or behind: the chat template adds BOS and turns (data/chat.py).
        """
        if not special:
            return self.ordinary(text)
        ids = []
        for n, part in enumerate(self.split(text)):
            ids += [self.special[part]] if n % 2 else self.ordinary(part)
        return ids

    def split(self, text: str) -> list[str]:
        """`text` cut at control tokens: plain text (perhaps empty), control token, plain text, and so on."""
        return self._control.split(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens by name; broken UTF-8 and ids without a token become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as ids arrive: a character is held back until all of its bytes are there."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            # Embeddings may have more rows than there are tokens (Qwen2: 152064 > 151646).
            if text := utf8.decode(self.pieces.get(int(i), b"\xef\xbf\xbd")):
                yield text
        if text := utf8.decode(b"", final=True):
            yield text


def portions(text: str) -> Iterator[str]:
    """`text` in portions of at most CUT characters, cut at word borders wherever there is one."""
    start = 0
    while len(text) - start > CUT:
        border = BORDER.search(text, start + CUT // 2, start + CUT)
        end = border.start() if border else start + CUT
        yield text[start:end]
        start = end
    yield text[start:]


# ---- byte-level BPE: Qwen2, Llama 3, the tiny model ----------------------------------------------


def byte_level(vocab: dict[str, int], special: dict[str, int], words: str = QWEN2_WORDS, nfc: bool = True) -> Tokenizer:
    """A tokenizer from vocab.json's content; ids must be in merge order, tiktoken's priorities."""
    try:
        ranks = {bytes(BYTE[c] for c in token): i for token, i in vocab.items()}
    except KeyError as e:
        raise ValueError(f"the vocabulary is not byte-level BPE: no byte is written {short(e.args[0])}") from e
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes, first {missing[0]:#04x}")
    if len(set(ranks.values()) | set(special.values())) < len(ranks) + len(special):
        raise ValueError("two tokens of the vocabulary have the same id")
    bpe = tiktoken.Encoding("ours", pat_str=words, mergeable_ranks=ranks, special_tokens={})

    def ordinary(text: str) -> list[int]:
        text = unicodedata.normalize("NFC", text) if nfc else text
        return [i for portion in portions(text) for i in bpe.encode_ordinary(portion)]

    return Tokenizer(ordinary, {i: token for token, i in ranks.items()}, special)


def check_vocabulary(vocab: dict[str, int], merges: Iterable[Sequence[str]], source: Path) -> None:
    """Refuse ids that are no ids, or not in the order of the merges (if the folder has them)."""
    if bad := [token for token, i in vocab.items() if type(i) is not int or not ID["least"] <= i <= ID["most"]]:
        i = short(vocab[bad[0]])
        raise ValueError(f"{source}: token {short(bad[0])} has the id {i}, expected an integer from 0 to {ID['most']}")
    last = 0
    for pair in merges:
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(token, str) for token in pair)
        i = vocab.get("".join(pair), -1) if is_pair else -1
        if i < last:
            raise ValueError(
                f"{source}: merge {short(' '.join(pair) if is_pair else pair)} has no id, or one out of merge order"
            )
        last = i


# ---- sentencepiece: Llama 2, Vicuna, Mistral -----------------------------------------------------


def sentence_pieces(file: Path, special: dict[str, int]) -> Tokenizer:
    """A tokenizer from tokenizer.model; as in Hugging Face's slow legacy one, a call adds a leading space."""
    import sentencepiece  # only the baselines of Fig. 4 need it

    pieces, control = {}, {}
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        for i in range(model.get_piece_size()):
            piece = model.id_to_piece(i)
            if model.is_control(i) or model.is_unknown(i):
                control[piece] = i
            elif model.is_byte(i):  # written "<0x0A>"
                pieces[i] = bytes([int(piece[3:5], 16)])
            else:
                pieces[i] = piece.replace("\u2581", " ").encode()
    except (RuntimeError, OSError, ValueError) as e:
        raise ValueError(f"{file} is not a sentencepiece model: {short(str(e))}") from e
    return SentencePieces(partial(model.encode, out_type=int), pieces, {**control, **special})


class SentencePieces(Tokenizer):
    """Sentencepiece puts a space before the text when it encodes; take it off again when decoding."""

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """As Tokenizer.stream, without that first space."""
        first = True
        for text in super().stream(ids):
            if text := text.removeprefix(" ") if first else text:
                yield text
            first = False


# ---- a folder ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ControlToken:
    """An entry of added_tokens in tokenizer.json, or of added_tokens_decoder in tokenizer_config.json."""

    content: str
    id: int = field(metadata=ID)


@dataclass(frozen=True)
class Step:
    """The pre_tokenizer or the normalizer of tokenizer.json, or a part of one."""

    type: str
    pattern: dict[str, str] = field(default_factory=dict)
    pretokenizers: list[dict] | None = None


@dataclass(frozen=True)
class Bpe:
    """The model of tokenizer.json; `check_vocabulary` looks into its tokens."""

    vocab: dict
    type: Literal["BPE"] = "BPE"
    merges: list = field(default_factory=list)


@dataclass(frozen=True)
class Whole:
    """What is read of tokenizer.json."""

    model: Bpe
    pre_tokenizer: Step | None = None
    normalizer: Step | None = None


def read_specials(folder: Path) -> dict[str, int]:
    """Control tokens from the three places where Hugging Face writes them; they must agree."""
    named = [*read_json(folder / "added_tokens.json", dict[str, int], **ID).items()]
    lists = {"tokenizer.json": "added_tokens", "tokenizer_config.json": "added_tokens_decoder"}
    for file, key in lists.items():
        entries = read_json(folder / file).get(key) or []
        if isinstance(entries, dict) and all(map(str.isdecimal, entries)):
            entries = [entry | {"id": int(i)} if isinstance(entry, dict) else entry for i, entry in entries.items()]
        entries = from_json(list[ControlToken], entries, f"{folder / file}: {key}")
        named += [(entry.content, entry.id) for entry in entries]
    special: dict[str, int] = {}
    for name, i in named:
        if not name or special.setdefault(name, i) != i:
            raise ValueError(
                f"{folder}: control token {short(name)} has no name or two ids, {special.get(name)} and {i}"
            )
    return special


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    Reads vocab.json (with merges.txt, if there, only to check it), else tokenizer.model, else tokenizer.json
    (beside a tokenizer.model, as in Llama 2's and Mistral's folders, it holds the same words in another form).
    Without a list of control tokens the three of Qwen2 follow the vocabulary.
    Raises ValueError for a folder without these files, and for a file that is damaged or of another kind.
    """
    folder = Path(folder)
    rows = from_json(int | None, read_json(folder / "config.json").get("vocab_size"), "vocab_size") or ID["most"]
    # The first Llama-2 lists a <pad> that its model has no embedding for.
    special = {name: i for name, i in read_specials(folder).items() if i < rows or name != "<pad>"}
    tokenizer = read_vocabulary(folder, special)
    if tokenizer.size > rows:
        name = short(tokenizer.decode([tokenizer.size - 1]))
        raise ValueError(
            f"{folder}: token {name} has the id {tokenizer.size - 1}, but config.json's vocab_size is {rows}; "
            "copy config.json and tokenizer from one model"
        )
    return tokenizer


def read_vocabulary(folder: Path, special: dict[str, int]) -> Tokenizer:
    """The tokenizer of a folder whose control tokens are known."""
    words, nfc = QWEN2_WORDS, True
    if vocab := read_json(source := folder / "vocab.json"):
        merges = folder / "merges.txt"
        lines = merges.read_text("utf-8", "replace").split("\n") if merges.exists() else [""]
        lines = lines[lines[0].startswith("#version") :]
        check_vocabulary(vocab, (line.split(" ") for line in lines if line), source)
        if whole := read_json(whole_file := folder / "tokenizer.json", Whole):  # it may split words in another way
            _, words, nfc = read_whole(whole, whole_file)
    elif (source := folder / "tokenizer.model").exists():
        return sentence_pieces(source, special)
    elif whole := read_json(source := folder / "tokenizer.json", Whole):
        vocab, words, nfc = read_whole(whole, source)
    else:
        raise ValueError(
            f"{folder} has no tokenizer: expected vocab.json, tokenizer.json or tokenizer.model; "
            "copy them from the model that the weights come from"
        )
    vocab = {token: i for token, i in vocab.items() if token not in special}
    if not special:
        special = {name: max(vocab.values(), default=-1) + 1 + n for n, name in enumerate(QWEN2_SPECIALS)}
    return byte_level(vocab, special, words, nfc)


def read_whole(whole: Whole, source: Path) -> tuple[dict[str, int], str, bool]:
    """(vocabulary, word pattern, whether text is normalised to NFC) of a tokenizer.json."""
    before = whole.pre_tokenizer or Step("")
    steps = [before] if before.pretokenizers is None else [from_json(Step, one) for one in before.pretokenizers]
    found = [step.pattern.get("Regex") for step in steps if step.type == "Split"]
    if found not in ([QWEN2_WORDS], [LLAMA3_WORDS]):
        raise ValueError(
            f"{source}: words are split by {short(found)}, expected the pattern of Qwen2 or Llama 3; Llama 2, Vicuna "
            "and Mistral are read from their tokenizer.model"
        )
    if whole.normalizer and whole.normalizer.type != "NFC":
        raise ValueError(f"{source}: text is normalised by {short(whole.normalizer.type)}, expected 'NFC' or none")
    # Older files write a merge as "a b", newer ones as ["a", "b"].
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in whole.model.merges)
    check_vocabulary(whole.model.vocab, merges, source)
    return whole.model.vocab, found[0], whole.normalizer is not None


# ---- training: the tiny model's vocabulary -------------------------------------------------------


def train_bpe(words: dict[str, int] | Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merge the most frequent pair of neighbours until each of `words` is one token.

    words: as they stand in text, space included (" star"), with counts or once each. The 256 bytes come
    first, in Qwen2's order, so that any text can be encoded. Returns (vocabulary, merges) as vocab.json and
    merges.txt spell them. Raises ValueError for a word that can never be one token ("12": one per digit).
    """
    counts = Counter(words)
    spelt = {w: [bytes([b]) for b in unicodedata.normalize("NFC", w).encode()] for w in counts}
    tokens = [bytes([b]) for b in sorted(range(256), key=lambda b: CHARACTER[b])]
    merges = []
    while any(len(parts) > 1 for parts in spelt.values()):
        pairs = Counter()
        for word, parts in spelt.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties: by spelling, not by order of words
        merges.append(best)
        tokens.append(best[0] + best[1])
        spelt = {word: merge(parts, best) for word, parts in spelt.items()}
    vocab = {gpt2_spelling(token): i for i, token in enumerate(tokens)}
    check = byte_level(vocab, {})
    if broken := [w for w in counts if len(check.encode(w)) != 1]:
        raise ValueError(
            f"{len(broken)} word(s) cannot be one token, first {broken[0]!r}: a word is an optional space "
            "and letters, or one digit, or an optional space and punctuation, or white space"
        )
    return vocab, [(gpt2_spelling(left), gpt2_spelling(right)) for left, right in merges]


def merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """`parts` with each occurrence of `pair`, from the left, joined."""
    merged: list[bytes] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def write_qwen2(folder: str | Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Write a vocabulary as Hugging Face's Qwen2Tokenizer reads it; QWEN2_SPECIALS get the ids after it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    added = {
        str(len(vocab) + n): {
            "content": name, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
            "single_word": False,
        }
        for n, name in enumerate(QWEN2_SPECIALS)
    }  # fmt: skip
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    text = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
