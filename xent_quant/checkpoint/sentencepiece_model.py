"""A SentencePiece `tokenizer.model` as a tokenizer.json, for checkpoints that have no other.

The file is a protocol buffer (sentencepiece_model.proto of google/sentencepiece): 1 pieces {1 text, 2 score, 3 type},
2 trainer {3 model_type, 35 byte_fallback, 40 unk_id, 41 bos_id}, 3 normaliser {2 precompiled_charsmap, 3 add_dummy_prefix,
4 remove_extra_whitespaces}. The sentencepiece package reads and checks it; it does not tell the settings, so they are taken
from the bytes.
"""

import base64
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xent_quant.checkpoint.headers import DAMAGED, read_json
from xent_quant.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNIGRAM, BPE = 1, 2


def processor(path: Path) -> Any:
    """The sentencepiece package's own tokenizer. Raises CheckpointError where it is not installed, or refuses the file."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError(
            f"{path}: the only tokenizer here, and it takes the sentencepiece package to read it; pip install sentencepiece"
        ) from None
    try:
        return SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, OSError, ValueError) as error:  # ValueError: its complaint holds bytes that are no text
        raise CheckpointError(f"{path}: not a SentencePiece model; {DAMAGED}") from error


def difference(path: Path, tokenizer: "Tokenizer", texts: Sequence[str]) -> str | None:
    """The first text that `tokenizer`, made by `tokenizer_value`, encodes otherwise than the file itself; None where none is."""
    original = processor(path)
    return next((t for t in texts if original.encode(t) != tokenizer.encode(t, add_special_tokens=False).ids), None)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message: int for a varint, float for 4 bytes, bytes for what has a length."""
    at = 0

    def varint() -> int:
        nonlocal at
        result = shift = 0
        while True:
            byte = data[at]
            at += 1
            result |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return result

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 2:
            size = varint()
            yield key >> 3, data[at : at + size]
            at += size
        else:
            size = {5: 4, 1: 8}[key & 7]
            yield key >> 3, struct.unpack("<f" if size == 4 else "<d", data[at : at + size])[0]
            at += size


def tokenizer_value(path: Path) -> dict[str, Any]:
    """The value of an equivalent tokenizer.json. Raises CheckpointError, and UnsupportedError for models of words or
    characters."""
    processor(path)
    try:
        return _convert(path, path.read_bytes())
    except (ValueError, KeyError, IndexError, struct.error, AttributeError, TypeError) as error:  # TypeError: a field's kind
        raise CheckpointError(f"{path}: not a SentencePiece model ({error}); {DAMAGED}") from error


def _convert(path: Path, data: bytes) -> dict[str, Any]:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normaliser: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), piece.get(2, 0.0), piece.get(3, NORMAL)))
            if not (isinstance(pieces[-1][1], float) and isinstance(pieces[-1][2], int)):
                raise TypeError("a piece's score or type is no number")
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normaliser = dict(_fields(value))
    if not pieces:
        raise CheckpointError(f"{path}: a SentencePiece model without pieces; {DAMAGED}")
    kind, fallback = trainer.get(3, UNIGRAM), bool(trainer.get(35))
    if kind not in (UNIGRAM, BPE):
        raise UnsupportedError(f"{path}: a SentencePiece model of words or characters; only BPE and Unigram can be exported")
    unknown = next((index for index, piece in enumerate(pieces) if piece[2] == UNKNOWN), 0)
    model: dict[str, Any]
    if kind == BPE:
        model = {"type": "BPE", "unk_token": pieces[unknown][0], "fuse_unk": True, "byte_fallback": fallback}
        model |= {"vocab": {text: index for index, (text, _, _) in enumerate(pieces)}, "merges": _merges(pieces)}
    else:
        vocab = [[text, score] for text, score, _ in pieces]
        model = {"type": "Unigram", "unk_id": unknown, "byte_fallback": fallback, "vocab": vocab}
    added = [
        {"id": index, "content": text, "special": kind != USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for index, (text, _, kind) in enumerate(pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    steps: list[dict[str, Any]] = []
    if normaliser.get(2):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(normaliser[2]).decode()})
    if normaliser.get(4, 1):
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if normaliser.get(3, 1):
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if normaliser.get(3, 1) else []),
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": _begins(path.parent, trainer.get(41, 1), pieces),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _merges(pieces: Sequence[tuple[str, float, int]]) -> list[list[str]]:
    """Every pair of pieces that makes a third, the best-scored third first: SentencePiece merges by the score of what results."""
    usable = {text for text, _, kind in pieces if kind in (NORMAL, USER_DEFINED)}
    best = sorted((piece for piece in pieces if piece[2] == NORMAL), key=lambda piece: -piece[1])
    return [
        [text[:cut], text[cut:]]
        for text, _, _ in best
        for cut in range(1, len(text))
        if text[:cut] in usable and text[cut:] in usable
    ]


def _begins(folder: Path, bos: int, pieces: Sequence[tuple[str, float, int]]) -> dict[str, Any] | None:
    """A BOS before every text, as the tokenizer classes made for such files do, unless tokenizer_config.json says otherwise."""
    config = folder / "tokenizer_config.json"
    asked = read_json(config).get("add_bos_token", True) if config.is_file() else True
    if not asked or not 0 <= bos < len(pieces) or pieces[bos][2] != CONTROL:
        return None
    text = pieces[bos][0]
    single = [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
    }
