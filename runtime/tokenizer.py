"""Text -> CLIP token ids: the first step of a prompt's way.

The byte-pair encoding of CLIP (Radford et al. 2021, arXiv 2103.00020), read from a converted folder's `vocab.json` and
`merges.txt`: clean the text, cut it into pieces, write each piece as byte symbols, merge the symbols in the order the
merges were learnt. Ids equal open_clip's `SimpleTokenizer` exactly. Special tokens, chunks and padding belong to
`conditioning.py`.
"""

from __future__ import annotations

import gzip
import html
import itertools
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glassine.errors import PackageError, RequestError

if TYPE_CHECKING:
    import regex

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
_LITERAL = {"<start_of_text>": BOS, "<end_of_text>": EOS}  # what open_clip reads as its own special tokens
_END = "</w>"
_SMALL = 4096
_CLIP_FILE = "clip_vocabulary/bpe_simple_vocab_16e6.txt.gz"
_CLIP_MERGES = 49152 - 256 - 2  # the file has more lines than CLIP uses
_PIECES = "<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+"


def byte_symbols() -> list[str]:
    """Return the printable character that stands for each byte 0..255.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards (GPT-2's table).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def clean(text: str) -> str:
    """Repair encodings, resolve HTML entities, collapse whitespace and lower the case, as CLIP's training did."""
    # ftfy cannot change printable ASCII without entities, and importing it takes longer than all other work here.
    if not (text.isascii() and text.replace("\n", " ").isprintable()) or "&" in text:
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class Piece(NamedTuple):
    """A part of a clean text that is spelled by itself: a word, a digit, signs, an added word.

    ids: its tokens; None where a small vocabulary cannot spell it.
    """

    start: int
    end: int
    ids: list[int] | None


class Tokenizer:
    """A CLIP vocabulary.

    CLIP's own spells every word, whole or in pieces that mean something. A small vocabulary, below 4096 tokens, was
    trained on its words and nothing else: others it spells in pieces without meaning, which `unknown` finds, or, where
    it lacks the bytes, not at all, which `encode` refuses.

    Attributes:
        bos, eos: ids of the start and end tokens.
        comma: id of a comma that ends a piece, or None.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        import regex  # the standard `re` has no \p{L}

        self._pieces = regex.compile(_PIECES, regex.IGNORECASE)
        self._ids = vocab
        self._tokens = {id: token for token, id in vocab.items()}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._bytes = byte_symbols()
        self._cache: dict[str, list[str]] = {}
        self.bos, self.eos = vocab[BOS], vocab[EOS]
        self.comma = vocab.get("," + _END)
        self._added: dict[str, range] = {}
        self._triggers: regex.Pattern[str] | None = None

    def add_words(self, words: Mapping[str, range]) -> None:
        """Let words stand for ids of their own: textual inversions. The longest that fits is taken.

        Args:
            words: word, as people write it -> its ids.
        """
        import regex

        self._added = {clean(word): ids for word, ids in words.items()}
        longest_first = sorted(self._added, key=len, reverse=True)
        pattern = "|".join(regex.escape(word) for word in longest_first)
        self._triggers = regex.compile(rf"(?<!\w)(?:{pattern})(?!\w)") if words else None

    def together(self, ids: list[int]) -> Iterator[list[int]]:
        """Cut ids into those that belong together: all of an added word's, else one by one."""
        lengths = {word[0]: len(word) for word in self._added.values()}
        at = 0
        while at < len(ids):
            count = lengths.get(ids[at], 1)
            yield ids[at : at + count]
            at += count

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `vocab.json` and `merges.txt` of a converted folder.

        Raises:
            PackageError: a file is missing, unreadable, or the two do not belong together.
        """
        vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
        try:
            raw = json.loads(vocab_path.read_text(encoding="utf-8"))
            lines = merges_path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError, RecursionError) as error:
            raise PackageError(f"{folder}: the tokenizer's files cannot be read ({error}); {_AGAIN}") from None
        vocab = _checked_vocab(vocab_path, raw)
        merges = _checked_merges(merges_path, lines, vocab)
        return cls(vocab, merges)

    @classmethod
    def clip(cls) -> Tokenizer:
        """Return CLIP's own vocabulary, which every Stable Diffusion was trained with, from the list OpenAI published.

        Ids: the 256 byte symbols, printable bytes first, the same at a word's end, one per merge, start, end.
        """
        packed = files("glassine.convert").joinpath(_CLIP_FILE).read_bytes()
        lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : 1 + _CLIP_MERGES]
        merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
        printable, others = (sorted(s for s in byte_symbols() if (ord(s) < 256) is wanted) for wanted in (True, False))
        symbols = [*printable, *others]
        tokens = [*symbols, *(s + _END for s in symbols), *(left + right for left, right in merges), BOS, EOS]
        return cls({token: id for id, token in enumerate(tokens)}, merges)

    @property
    def words(self) -> list[str]:
        """The words of two letters or more that are one token, but for endings of other words."""
        endings = {right for _, right in self._ranks}
        whole = (token[: -len(_END)] for token in self._ids if token.endswith(_END) and token not in endings)
        return sorted(word for word in whole if len(word) > 1 and word.isalpha())

    def unknown(self, text: str) -> list[str]:
        """Return the words of `text` that a small vocabulary does not have as one token; none for CLIP's own."""
        if len(self._ids) >= _SMALL:
            return []
        texts = [part for _, part in self._cut(clean(text)) if isinstance(part, str)]
        pieces = dict.fromkeys(piece for part in texts for piece in self._pieces.findall(part))
        return [piece for piece in pieces if piece.isalpha() and len(self._symbols(piece)) > 1]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without start and end tokens.

        Raises:
            RequestError: a small vocabulary cannot spell some words; the message names them and those it knows.
        """
        text = clean(text)
        pieces = list(self.pieces(text))
        unknown = [text[piece.start : piece.end] for piece in pieces if piece.ids is None]
        if unknown:
            raise RequestError(
                f"prompt: this model does not know {', '.join(map(repr, dict.fromkeys(unknown)))}; "
                f"it knows {', '.join(self.words)}"
            )
        return [id for piece in pieces for id in piece.ids or ()]

    def pieces(self, text: str) -> Iterator[Piece]:
        """Cut a clean text into what is spelled by itself, and say how."""
        for start, part in self._cut(text):
            if isinstance(part, Piece):
                yield part
                continue
            for match in self._pieces.finditer(part):
                symbols = self._symbols(match.group())
                known = all(symbol in self._ids for symbol in symbols)
                ids = [self._ids[symbol] for symbol in symbols] if known else None
                yield Piece(start + match.start(), start + match.end(), ids)

    def decode(self, ids: list[int]) -> str:
        """Return text that encodes to `ids`: lower case, every piece followed by a space, special tokens left out."""
        inverse = {symbol: byte for byte, symbol in enumerate(self._bytes)}
        added = {ids[0]: word for word, ids in self._added.items()}
        data = b""
        for id in ids:
            if id in added:
                data += f"{added[id]} ".encode()
            elif id in self._tokens and id not in (self.bos, self.eos):
                token = self._tokens[id].replace(_END, " ")
                data += b"".join(b" " if symbol == " " else bytes([inverse[symbol]]) for symbol in token)
        return data.decode("utf-8", errors="replace").strip()

    def _cut(self, text: str) -> Iterator[tuple[int, str | Piece]]:
        """Cut clean text into words that were added and what lies between them, and say where each begins."""
        at = 0
        for match in self._triggers.finditer(text) if self._triggers is not None else ():
            yield at, text[at : match.start()]
            yield match.start(), Piece(match.start(), match.end(), list(self._added[match.group()]))
            at = match.end()
        yield at, text[at:]

    def _symbols(self, piece: str) -> list[str]:
        """Return the tokens of one piece: its byte symbols, merged in the order of the ranks."""
        if piece in _LITERAL:
            return [_LITERAL[piece]]
        symbols = self._cache.get(piece)
        if symbols is None:
            symbols = [self._bytes[byte] for byte in piece.encode("utf-8")]
            symbols[-1] += _END
            self._cache[piece] = symbols = self._join(symbols)
        return symbols

    def _join(self, symbols: list[str]) -> list[str]:
        """Join the pair of lowest rank, the leftmost first, until no pair can be joined."""
        never = len(self._ranks)
        ranks = [self._ranks.get(pair, never) for pair in itertools.pairwise(symbols)]
        while ranks and (best := min(ranks)) < never:
            i = ranks.index(best)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            del ranks[i]
            for j in range(max(i - 1, 0), min(i + 1, len(ranks))):
                ranks[j] = self._ranks.get((symbols[j], symbols[j + 1]), never)
        return symbols


_AGAIN = "convert the model again"
_MOST = 1 << 24  # text encoders take ids as float32, which counts no further


def _checked_vocab(path: Path, raw: Any) -> dict[str, int]:
    if not isinstance(raw, dict) or not all(type(id) is int and 0 <= id < _MOST for id in raw.values()):
        raise PackageError(f"{path}: expected an object of token -> id, 0 to {_MOST - 1}; {_AGAIN}")
    vocab: dict[str, int] = raw
    if len(set(vocab.values())) != len(vocab):
        raise PackageError(f"{path}: {len(vocab)} tokens share {len(set(vocab.values()))} ids; {_AGAIN}")
    missing = [token for token in (BOS, EOS) if token not in vocab]
    if missing:
        raise PackageError(f"{path}: no token {' and '.join(missing)} among {len(vocab)}; {_AGAIN}")
    return vocab


def _checked_merges(path: Path, lines: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise PackageError(f"{path}: line {number} is {line[:60]!r}, expected two symbols; {_AGAIN}")
        if "".join(pair) not in vocab:
            raise PackageError(f"{path}: line {number} makes {''.join(pair)!r}, which vocab.json lacks; {_AGAIN}")
        merges.append((pair[0], pair[1]))
    return merges
