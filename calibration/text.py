"""Calibration text: from what a person names to windows of token ids.

A source is a file or folder that `calibration.documents` reads, a dataset on the Hub, or a preset: of the bundled suites, or of
`calibration.presets` on the Hub. Every source gives its share of the tokens; where one runs out, the others fill up.
"""

import logging
import random
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibration.chat import ChatTemplate
from calibration.documents import SUFFIXES, TEXT_FIELD, documents, have_fields
from calibration.notes import Notes
from calibration.presets import HUB, PREFIX, download, passages
from xent_quant.checkpoint.hub import failures, is_hub_id, reason
from xent_quant.errors import CalibrationError
from xent_quant.plain import plain
from xent_quant.units import human_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

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
"""How much more English than Chinese a preset takes where the model's vocabulary has little Chinese. Chinese models know both
languages: in equal parts they lose least (docs/calibration.md)."""

CHINESE_SHARE = 0.25
"""A vocabulary with at least this share of tokens with Chinese characters is a Chinese model's."""

CARDS = ["README.md", "dataset_infos.json", "*/.*", ".*"]
"""Files of a Hub dataset that describe it."""

LARGEST = 4 << 30
"""Bytes of a data set on the Hub that are downloaded at most."""

CHARACTERS_PER_TOKEN = 16
"""Text that is read for every token wanted, so that the seed has something to choose from."""


@dataclass(frozen=True)
class Source:
    """Where documents come from, and its weight among the sources; the suite of a preset on the Hub, and for what comes from
    there its `origin` for the record."""

    name: str
    path: Path
    weight: float = 1.0
    preset: str | None = None
    origin: str = ""


@dataclass(frozen=True)
class CalibrationText:
    """`windows` [n, length] int64 token ids to calibrate on, `spare` [m, length] more of the same text; `names` of sources;
    `notes` of what a person should know about how the text was read and whether it suffices."""

    windows: NDArray[np.int64]
    spare: NDArray[np.int64]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def told(self, *notes: str) -> "CalibrationText":
        """With more notes."""
        for note in notes:
            log.info(note)
        return replace(self, notes=(*self.notes, *notes))


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


def weights_of(mix: str | None, chinese: bool) -> dict[str, float]:
    """Of languages, domains and suites; without a mix HEAVY for English, or none if `chinese`. Raises CalibrationError."""
    if mix:
        return parse_mix(mix)
    return {} if chinese else {"en": HEAVY}


def weight_of(suite: str, weights: Mapping[str, float]) -> float:
    """What is said of the suite, its domain and its language, multiplied; 1 of what nothing is said."""
    return float(np.prod([weights.get(key, 1.0) for key in (suite, *suite.split("-"))]))


def bundled(weights: Mapping[str, float], without: Container[str] = ()) -> list[Source]:
    """The bundled suites that have a weight, but those of names `without`."""
    every = [Source(suite, suite_path(suite), weight_of(suite, weights)) for suite in SUITES if suite not in without]
    return [source for source in every if source.weight]


def sources(calib: Sequence[str], mix: str | None, chinese: bool, seed: int = 0) -> list[Source]:
    """The sources of `--calib`; nothing named is the preset entertainment. Of presets on the Hub `seed` chooses the files, which
    are downloaded. Raises CalibrationError naming what is not there.

    A suite's weight is `weight_of`'s.
    """
    weights = weights_of(mix, chinese)
    named = [(item, PRESETS.get(item.removeprefix(PREFIX), ())) for item in calib or ("entertainment",)]
    # Text of one's own is supplemented with any of them.
    mixed = {key for _, suites in named for suite in suites or SUITES for key in (suite, *suite.split("-"))}
    if mix and (idle := {key for key, weight in weights.items() if weight} - mixed):
        raise CalibrationError(f"--calib-mix {min(idle)}: has no effect, since it is in no preset of --calib; drop it")
    found: list[Source] = []
    for item, suites in named:
        for suite in suites:
            weight = weight_of(suite, weights)
            if weight and item.startswith(PREFIX):
                path = download(suite, seed)
                found.append(Source(PREFIX + suite, path, weight, suite, f"{HUB[suite].origin}, {path.name}"))
            elif weight:
                found.append(Source(suite, suite_path(suite), weight))
        if suites:
            continue
        path = Path(item)
        try:
            path = path.expanduser()
            there = path.exists()
        except (OSError, ValueError, RuntimeError):  # text itself, too long for a name; nobody's home
            there = False
        if there:
            found.append(Source(item, path))
        else:
            path = _dataset(item)
            found.append(Source(item, path, origin=path.name))  # the snapshot's folder has the commit's name
    if not found:
        raise CalibrationError("--calib-mix: every weight is 0; leave one")
    return found


def _dataset(item: str) -> Path:
    if not is_hub_id(item):
        presets = ", ".join(PRESETS)
        raise CalibrationError(
            f"--calib {item[:200]!r}: no such file or folder, not a Hub dataset id, and no preset; there are {presets}, "
            f"and with {PREFIX} before it each from the Hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        kinds = [f"*{suffix}" for suffix in SUFFIXES]
        _refuse_large(item, kinds)
        return Path(snapshot_download(item, repo_type="dataset", allow_patterns=kinds, ignore_patterns=CARDS))
    except RepositoryNotFoundError as error:
        raise CalibrationError(f"--calib {item}: no such file or folder here, and no such public dataset on the Hub") from error
    except failures() as error:
        raise CalibrationError(
            f"--calib {item}: no such file or folder here, and the Hub could not be reached ({reason(error)})"
        ) from error


def _refuse_large(item: str, kinds: Sequence[str]) -> None:
    """Raise CalibrationError for a data set on the Hub whose files of text are more than anyone wants to download for this."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    try:
        files = HfApi().dataset_info(item, files_metadata=True).siblings or []
    except failures():  # then what is in the cache will do, or the download says why not
        return
    text = filter_repo_objects(files, allow_patterns=list(kinds), ignore_patterns=CARDS, key=lambda file: file.rfilename)
    nbytes = sum(file.size or 0 for file in text)
    if nbytes > LARGEST:
        raise CalibrationError(
            f"--calib {item}: its files of text are {human_bytes(nbytes)}; a few thousand pages will do: download some of them "
            f"(hf download --repo-type dataset {item} FILE --local-dir FOLDER) and give that folder"
        )


def load(
    found: Sequence[Source],
    tokenizer: "Tokenizer",
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    bos: int | None = None,
    text_field: str = TEXT_FIELD,
    spare: int = 0,
    chat: ChatTemplate | None = None,
) -> CalibrationText:
    """About `tokens` token ids of the sources in windows of `length`, and up to `spare` more; documents in an order that
    `seed` decides, `bos` before each that does not begin with it. Conversations go through `chat`. Raises CalibrationError where
    the text does not fill one window.
    """
    if text_field != TEXT_FIELD and not any(have_fields(source.path) for source in found if not source.preset):
        raise CalibrationError(f"--text-field {text_field}: has no effect, since the text is in no file with fields; drop it")
    notes = Notes()
    streams: list[list[int]] = []
    total = sum(source.weight for source in found)
    for index, source in enumerate(found):
        # Sources may fill up for others, so each is read as far as it could be asked for.
        room = (tokens + spare) * CHARACTERS_PER_TOKEN
        if source.preset:
            texts = passages(source.preset, source.path, seed, room, chat, notes)
        else:
            texts = _first(documents(source.path, text_field, chat=chat, longest=room, notes=notes), room)
        random.Random(f"{seed} {index}").shuffle(texts)
        stream: list[int] = []
        for text in texts:
            if len(stream) >= tokens + spare:
                break
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            # Chat templates write it themselves.
            stream += ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        streams.append(stream)
    if not any(streams):
        raise CalibrationError(f"--calib {', '.join(source.name for source in found)}: no text in it; give some")
    weights = [source.weight / total for source in found]
    shares = _shares([len(stream) for stream in streams], weights, tokens)
    chosen = _cut([stream[:share] for stream, share in zip(streams, shares, strict=True)], length)
    left = [stream[share:] for stream, share in zip(streams, shares, strict=True)]
    more = _shares([len(stream) for stream in left], weights, spare)
    rest = _mixed([stream[:share] for stream, share in zip(left, more, strict=True)], length)
    if not len(chosen):
        there = sum(map(len, streams))
        remedy = "give more text" if there <= tokens else "raise --tokens"
        raise CalibrationError(
            f"--calib {', '.join(source.name for source in found)}: {min(there, tokens)} tokens do not fill one window of "
            f"{length}; {remedy}, or lower --seqlen"
        )
    names = tuple(plain(f"{source.name} ({source.origin})" if source.origin else source.name) for source in found)
    return CalibrationText(chosen, rest, names).told(*notes.lines())


def _mixed(streams: Sequence[Sequence[int]], length: int) -> NDArray[np.int64]:
    """Windows [n, length] of each stream, so that the first of them have as much of each in proportion as all."""
    windows = [_cut([stream], length) for stream in streams]
    places = np.concatenate([(np.arange(len(each)) + 0.5) / max(1, len(each)) for each in windows])
    found: NDArray[np.int64] = np.concatenate(windows)[np.argsort(places, kind="stable")]
    return found


def _first(texts: Iterator[str], room: int) -> list[str]:
    """As many as begin within `room` characters."""
    found: list[str] = []
    while room > 0 and (text := next(texts, None)) is not None:
        found.append(text[:room])
        room -= len(text)
    return found


def more_text(names: Iterable[str]) -> str:
    """How a person gets more text than the sources called so."""
    from_hub = any(name.startswith(PREFIX) for name in names)
    return "--calib, repeatable" + ("" if from_hub else f"; {PREFIX}entertainment draws some from the Hub")


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
