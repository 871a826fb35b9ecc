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
from functools import partial
from itertools import pairwise
from pathlib import Path

import tiktoken

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
        raise ValueError(f"the vocabulary is not byte-level BPE: no byte is written {e}") from e
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
    """Refuse ids that are no integers, or not in the order of the merges (if the folder has them)."""
    if bad := [token for token, i in vocab.items() if type(i) is not int or i < 0]:
        raise ValueError(f"{source}: token {bad[0]!r} has the id {vocab[bad[0]]!r}, expected an integer from 0")
    last = 0
    for pair in merges:
        i = vocab.get("".join(pair), -1) if len(pair) == 2 else -1
        if i < last:
            raise ValueError(f"{source}: merge {' '.join(pair)!r} has no id, or one out of merge order")
        last = i


# ---- sentencepiece: Llama 2, Vicuna, Mistral -----------------------------------------------------


def sentence_pieces(file: Path, special: dict[str, int]) -> Tokenizer:
    """A tokenizer from tokenizer.model; as in Hugging Face's slow legacy one, a call adds a leading space."""
    import sentencepiece  # only the baselines of Fig. 4 need it

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as e:
        raise ValueError(f"{file} is not a sentencepiece model: {e}") from e
    pieces, control = {}, {}
    for i in range(model.get_piece_size()):
        piece = model.id_to_piece(i)
        if model.is_control(i) or model.is_unknown(i):
            control[piece] = i
        elif model.is_byte(i):  # written "<0x0A>"
            pieces[i] = bytes([int(piece[3:5], 16)])
        else:
            pieces[i] = piece.replace("\u2581", " ").encode()
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


def read_json(file: Path) -> dict:
    """A JSON file whose top level is an object, or {} when there is no such file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not valid JSON: {e}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{file} should hold a JSON object, found {type(content).__name__}")
    return content


def read_specials(folder: Path) -> dict[str, int]:
    """Control tokens from the three places where Hugging Face writes them; they must agree."""
    whole, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    named = list(read_json(folder / "added_tokens.json").items())
    try:
        named += [(t["content"], t["id"]) for t in whole.get("added_tokens", [])]
        named += [(t["content"], int(i)) for i, t in config.get("added_tokens_decoder", {}).items()]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{folder}: the list of control tokens is damaged, found {e!r}") from e
    special: dict[str, int] = {}
    for name, i in named:
        if special.setdefault(name, i) != i:
            raise ValueError(f"{folder}: control token {name!r} has two ids, {special[name]} and {i}")
    return special


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder.

    Reads vocab.json (with merges.txt, if there, only to check it), else tokenizer.model, else tokenizer.json
    (beside a tokenizer.model, as in Llama 2's and Mistral's folders, it holds the same words in another form).
    Without a list of control tokens the three of Qwen2 follow the vocabulary.
    Raises ValueError for a folder without these files, and for a file that is damaged or of another kind.
    """
    folder = Path(folder)
    special = read_specials(folder)
    words, nfc = QWEN2_WORDS, True
    if vocab := read_json(source := folder / "vocab.json"):
        merges = folder / "merges.txt"
        lines = merges.read_text("utf-8").split("\n") if merges.exists() else [""]
        lines = lines[lines[0].startswith("#version") :]
        check_vocabulary(vocab, (line.split(" ") for line in lines if line), source)
    elif (source := folder / "tokenizer.model").exists():
        return sentence_pieces(source, special)
    elif whole := read_json(source := folder / "tokenizer.json"):
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


def read_whole(whole: dict, source: Path) -> tuple[dict[str, int], str, bool]:
    """(vocabulary, word pattern, whether text is normalised to NFC) of a tokenizer.json."""
    model = whole.get("model", {})
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{source}: expected a BPE model with a vocabulary, found {model.get('type')!r}")
    before = whole.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    found = [s.get("pattern", {}).get("Regex") for s in steps if s.get("type") == "Split"]
    if found not in ([QWEN2_WORDS], [LLAMA3_WORDS]):
        raise ValueError(
            f"{source}: words are split by {found}, expected the pattern of Qwen2 or Llama 3; Llama 2, Vicuna and "
            "Mistral are read from their tokenizer.model"
        )
    if (normal := (whole.get("normalizer") or {}).get("type")) not in (None, "NFC"):
        raise ValueError(f"{source}: text is normalised by {normal!r}, expected 'NFC' or none")
    # Older files write a merge as "a b", newer ones as ["a", "b"].
    merges = (m.split(" ") if isinstance(m, str) else m for m in model.get("merges", []))
    check_vocabulary(model["vocab"], merges, source)
    return model["vocab"], found[0], normal == "NFC"


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


def write_qwen2(
    folder: str | Path, vocab: dict[str, int], merges: list[tuple[str, str]], specials: Iterable[str] = QWEN2_SPECIALS
) -> None:
    """Write a vocabulary as Hugging Face's Qwen2Tokenizer reads it; `specials` get the ids after it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    added = {
        str(len(vocab) + n): {
            "content": name, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
            "single_word": False,
        }
        for n, name in enumerate(specials)
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
