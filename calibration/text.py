"""Calibration text: from what a person names to windows of token ids.

A source is a .txt or .md file (one document, or several between lines `<|document|>`), .jsonl or .parquet (a document per
row), a folder of such files, a dataset on the Hub, or a preset of the bundled suites. Every source gives its share of the
tokens; where one runs out, the others fill up.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xent_quant.errors import CalibrationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DOMAINS = ("fiction", "conversation", "webcc")
LANGUAGES = ("zh", "en")
SUITES = tuple(f"{domain}-{language}" for domain in DOMAINS for language in LANGUAGES)
PRESETS: dict[str, tuple[str, ...]] = {
    "entertainment": SUITES,
    **{f"entertainment-{language}": tuple(s for s in SUITES if s.endswith(language)) for language in LANGUAGES},
    **{domain: tuple(s for s in SUITES if s.startswith(domain)) for domain in DOMAINS},
    **{suite: (suite,) for suite in SUITES},
}
"""Preset to the suites that it mixes."""

HEAVY = 3.0
"""How much more of the model's own language a preset takes than of the other."""

CHINESE_SHARE = 0.25
"""A vocabulary with at least this share of tokens with Chinese characters is a Chinese model's."""

SEPARATOR = "<|document|>"
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
CHARACTERS_PER_TOKEN = 16
"""Text that is read for every token wanted, so that the seed has something to choose from."""


@dataclass(frozen=True)
class Source:
    """Where documents come from, and its weight among the sources."""

    name: str
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class CalibrationText:
    """`windows` [n, length] int64 token ids to calibrate on, `spare` [m, length] more of the same text; `names` of sources."""

    windows: NDArray[np.int64]
    spare: NDArray[np.int64]
    names: tuple[str, ...]


def suite_path(suite: str) -> Path:
    domain, language = suite.split("-")
    return Path(str(resources.files("xent_quant") / "data" / "calibration" / f"X{domain}{language.upper()}.txt"))


def is_chinese(tokenizer: "Tokenizer") -> bool:
    """Whether the vocabulary is a Chinese model's."""
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    decoded = tokenizer.decode_batch([[index] for index in vocab.values()])
    return sum(bool(re.search("[一-鿿]", token)) for token in decoded) >= CHINESE_SHARE * len(vocab)


def parse_mix(mix: str) -> dict[str, float]:
    """ "zh=3,en=1" or "fiction-zh=2,webcc=0" to weights. Raises CalibrationError."""
    known = {*LANGUAGES, *DOMAINS, *SUITES}
    weights: dict[str, float] = {}
    for item in mix.split(","):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known or not re.fullmatch(r"\d+(\.\d+)?", value):
            raise CalibrationError(f"--calib-mix {item.strip()!r}: write NAME=WEIGHT; names are {', '.join(sorted(known))}")
        weights[key] = float(value)
    return weights


def sources(calib: Sequence[str], mix: str | None, chinese: bool) -> list[Source]:
    """The sources of `--calib`; nothing named is the preset entertainment. Raises CalibrationError naming what is not there.

    A suite weighs what `mix` says of it, its domain and its language, multiplied; without a mix HEAVY in the model's own
    language, 1 in the other.
    """
    weights = parse_mix(mix) if mix else {("zh" if chinese else "en"): HEAVY}
    found: list[Source] = []
    for item in calib or ("entertainment",):
        if item in PRESETS:
            for suite in PRESETS[item]:
                weight = np.prod([weights.get(key, 1.0) for key in (suite, *suite.split("-"))])
                if weight:
                    found.append(Source(suite, suite_path(suite), float(weight)))
            continue
        path = Path(item).expanduser()
        if not path.exists():
            path = _dataset(item)
        found += [Source(item, path)]
    if not found:
        raise CalibrationError("--calib-mix: every weight is 0; leave one")
    return found


def _dataset(item: str) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", item):
        presets = ", ".join(PRESETS)
        raise CalibrationError(
            f"--calib {item}: no such file or folder, not a Hub dataset id, and no preset; there are {presets}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(item, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in SUFFIXES]))
    except RepositoryNotFoundError as error:
        raise CalibrationError(f"--calib {item}: no such file or folder here, and no such public dataset on the Hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CalibrationError(
            f"--calib {item}: no such file or folder here, and the Hub could not be reached ({first})"
        ) from error


def documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """Texts of a file or of all readable files of a folder, in order of their names; empty ones are left out.

    Raises CalibrationError naming file, line and remedy.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise CalibrationError(f"{path}: holds no {', '.join(SUFFIXES)} file; give text to calibrate on")
        for file in files:
            yield from documents(file, text_field)
        return
    readers = {".jsonl": _json_lines, ".parquet": _parquet, ".txt": _plain, ".md": _plain}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise CalibrationError(
            f"{path}: cannot read {path.suffix or 'such'} files; give {', '.join(SUFFIXES)} or a folder of them"
        )
    try:
        yield from (text for text in reader(path, text_field) if text.strip())
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 (byte {error.start}); convert it") from error
    except OSError as error:
        raise CalibrationError(f"{path}: {error.strerror or error}") from error


def _plain(path: Path, _: str) -> Iterator[str]:
    lines: list[str] = []
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.strip() == SEPARATOR:
                yield "".join(lines).strip("\n")
                lines = []
            else:
                lines.append(line)
    yield "".join(lines).strip("\n")


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(
                    f"{path}, line {number}: not JSON ({error.msg}); a .jsonl file has one object a line"
                ) from error
            if not isinstance(value, dict) or not isinstance(value.get(text_field), str):
                fields = ", ".join(map(repr, value)) if isinstance(value, dict) else "no fields"
                raise CalibrationError(
                    f"{path}, line {number}: no text in field {text_field!r} (there are {fields}); name it by --text-field"
                )
            yield value[text_field]


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise CalibrationError(f"{path}: reading .parquet needs pyarrow; pip install 'xent-quant[parquet]'") from error
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{path}: not a readable Parquet file ({error})") from error
    names = file.schema_arrow.names
    if text_field not in names:
        raise CalibrationError(f"{path}: no column {text_field!r} (there are {', '.join(names)}); name it by --text-field")
    for batch in file.iter_batches(batch_size=256, columns=[text_field]):
        yield from (str(text) for text in batch.column(0).to_pylist() if text)


def load(
    found: Sequence[Source],
    tokenizer: "Tokenizer",
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    bos: int | None = None,
    text_field: str = "text",
    spare: int = 0,
) -> CalibrationText:
    """About `tokens` token ids of the sources in windows of `length`, and up to `spare` more; documents in an order that
    `seed` decides, `bos` before each. Raises CalibrationError where the text does not fill one window.
    """
    streams: list[list[int]] = []
    total = sum(source.weight for source in found)
    for index, source in enumerate(found):
        # Sources may fill up for others, so each is read as far as it could be asked for.
        room = (tokens + spare) * CHARACTERS_PER_TOKEN
        texts: list[str] = []
        for text in documents(source.path, text_field):
            texts.append(text[:room])
            room -= len(text)
            if room <= 0:
                break
        random.Random(f"{seed} {index}").shuffle(texts)
        stream: list[int] = []
        for text in texts:
            if len(stream) >= tokens + spare:
                break
            stream += [*([] if bos is None else [bos]), *tokenizer.encode(text, add_special_tokens=False).ids]
        streams.append(stream)
    if not any(streams):
        raise CalibrationError(f"--calib {', '.join(source.name for source in found)}: no text in it; give some")
    shares = _shares([len(stream) for stream in streams], [source.weight / total for source in found], tokens)
    chosen = _cut([stream[:share] for stream, share in zip(streams, shares, strict=True)], length)
    rest = _cut([stream[share:] for stream, share in zip(streams, shares, strict=True)], length)[: spare // length]
    if not len(chosen):
        there = sum(map(len, streams))
        remedy = "give more text" if there <= tokens else "raise --tokens"
        raise CalibrationError(
            f"--calib {', '.join(source.name for source in found)}: {min(there, tokens)} tokens do not fill one window of "
            f"{length}; {remedy}, or lower --seqlen"
        )
    return CalibrationText(chosen, rest, tuple(source.name for source in found))


def _shares(available: Sequence[int], weights: Sequence[float], tokens: int) -> list[int]:
    """Tokens of each source: in proportion to the weights, what one lacks shared out among the others."""
    shares = [0] * len(available)
    open_ = set(range(len(available)))
    while open_ and (left := tokens - sum(shares)) > 0:
        total = sum(weights[index] for index in open_)
        before = list(shares)
        for index in sorted(open_):
            shares[index] = min(available[index], before[index] + max(1, int(left * weights[index] / total)))
        open_ = {index for index in open_ if shares[index] < available[index]}
    return shares


def _cut(streams: Sequence[Sequence[int]], length: int) -> NDArray[np.int64]:
    """Windows of each stream, then of what is left of all of them together: [n, length]."""
    whole = [list(stream[: len(stream) // length * length]) for stream in streams]
    rest = [token for stream, used in zip(streams, whole, strict=True) for token in stream[len(used) :]]
    joined = [token for stream in whole for token in stream] + rest[: len(rest) // length * length]
    return np.array(joined, dtype=np.int64).reshape(-1, length)
