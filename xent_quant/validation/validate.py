"""Is an exported model within tolerance of its checkpoint? The engine: it knows interfaces, and draws and prints nothing."""

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import log, sqrt
from pathlib import Path

import numpy as np
import torch

from xent_quant.checkpoint import dropping
from xent_quant.checkpoint.architecture import EXPERTS_KEY, Architecture
from xent_quant.checkpoint.headers import read_json
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import ExportError, ValidationError
from xent_quant.model.stages import Stage
from xent_quant.model.streaming import StreamingModel
from xent_quant.progress import Progress, Silent
from xent_quant.recipes import most_common
from xent_quant.storage import read_bytes, replace_bytes, sealed, unsealed
from xent_quant.tensors import Role
from xent_quant.validation import gates, measures, runtimes, weights
from xent_quant.validation.gguf_source import GGUFFile, GGUFSource
from xent_quant.validation.measures import Estimate, Summary
from xent_quant.validation.reference import Reference, Streamed, SuiteTokens, pieces, references, stream, tokenize, work_folder
from xent_quant.validation.report import KL_EDGES, Finding, Report, SuiteResult, Suspicion
from xent_quant.validation.scoring import Comparison, CrossCheck, Scores, agreement, run
from xent_quant.validation.suites import GROUPS, Suite
from xent_quant.validation.weights import TypedSource, compare_all

TOKENIZER_AGREEMENT = 0.99
"""Below this share of common token ids the runtime reads another text than the reference."""


@dataclass(frozen=True)
class Exported:
    """An export opened from headers: its weights, the checkpoint that those are of (without the experts that were dropped), the
    name of its mix where it has one, and its weight files."""

    kind: runtimes.Kind
    source: TypedSource
    checkpoint: Checkpoint
    mix: str | None
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


class _Checkpoint:
    """A float checkpoint as an export, for judging a fine-tune or a conversion."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.architecture, self.read = checkpoint, checkpoint.architecture, checkpoint.read
        self.path = checkpoint.path

    def type(self, name: str) -> str:
        return self.checkpoint.infos[name].dtype

    def padding(self, name: str) -> float:
        return 0.0


class _Finite:
    """An export's weights, with every value that is read seen to be finite."""

    def __init__(self, path: Path, source: TypedSource) -> None:
        self.path, self._source = path, source
        self.architecture, self.type = source.architecture, source.type

    def read(self, name: str, start: int = 0, stop: int | None = None) -> weights.F32:
        """See `TypedSource`. Raises ValidationError naming the tensor."""
        with np.errstate(over="ignore", invalid="ignore"):
            values = self._source.read(name, start, stop)
        if not np.isfinite(values).all():
            raise ValidationError(f"{self.path}: {name}: NaN or infinite weights; export it again")
        return values

    def padding(self, name: str) -> float:
        """See `TypedSource`."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._source.padding(name)


def open_export(path: Path, kind: runtimes.Kind, whole: Checkpoint) -> Exported:
    """Headers of an export, checked against the reference. Raises ValidationError naming the file, key or tensor."""
    if kind == "gguf":
        import gguf

        file = GGUFFile(path)
        checkpoint = dropping.compared_with_gguf(whole, file.metadata, str(path))
        number = file.metadata.get("general.file_type")
        known = {int(item): item.name.removeprefix("MOSTLY_") for item in gguf.LlamaFileType}
        mix = known.get(number) if isinstance(number, int) else None
        return Exported(kind, _Finite(path, GGUFSource(file, checkpoint.architecture)), checkpoint, mix, tuple(file.files))
    source: TypedSource
    config = path / "config.json"
    checkpoint = dropping.compared_with(whole, read_json(config).get(EXPERTS_KEY), f"{config}: {EXPERTS_KEY}")
    reference = checkpoint.architecture
    if kind == "onnx":
        from xent_quant.validation.onnx_source import OnnxSource

        source = OnnxSource(path)
    elif kind == "checkpoint":
        source = _Checkpoint(Checkpoint.open(path))
    else:
        from xent_quant.validation.bnb_source import BnbSource

        source = BnbSource(path, reference)
    _check_same(path, source.architecture, reference)
    files = tuple(sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".data", ".onnx", ".bin")))
    in_layers = [spec for spec in reference.tensors().values() if spec.layer is not None and spec.measured]
    mix = most_common((source.type(spec.name), spec.n_weights) for spec in in_layers)
    return Exported(kind, _Finite(path, source), checkpoint, mix, files)


def _check_same(path: Path, found: Architecture, wanted: Architecture) -> None:
    for key, value in vars(wanted).items():
        if key not in ("tie_word_embeddings", "max_position_embeddings") and getattr(found, key) != value:
            raise ValidationError(f"{path}: {key} is {getattr(found, key)}, the reference's is {value}; it is another model")


def validate(
    exported: Path,
    reference: Checkpoint,
    suites: Sequence[Suite],
    *,
    cache: Path,
    context: int = 512,
    max_tokens: int | None = None,
    tolerance: str | None = None,
    runtime: runtimes.RuntimeName = "auto",
    threads: int | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Compare an export with its checkpoint; see the package's modules for what each part means.

    The exact path (the exported bytes, dequantised and streamed through our forward) runs over the first window of every suite,
    as a check on the runtime and for per-layer errors; with runtime "torch" over everything. Holds a few times
    windows · context · hidden float32, an expert for each thread or a slice of the head, LOGITS logits, and whatever the runtime
    holds. Raises ValidationError in one line for what cannot be compared.
    """
    started = time.perf_counter()
    report = progress or Silent()
    if not suites:
        raise ValidationError("no suite was given")
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    kind = runtimes.kind_of(exported)
    used = runtimes.choose(kind, runtime)
    runtimes.require(kind, used)
    opened = open_export(exported, kind, reference)
    texts = tokenize(reference, suites, context, max_tokens)
    n_weights = opened.checkpoint.n_weights
    weight_bits = 8 * opened.nbytes / n_weights
    default = gates.tier(opened.mix, weight_bits)
    bounds = default if tolerance is None else gates.parse(tolerance, default)

    known = references(reference, texts, cache, report)
    tensors = tuple(compare_all(opened.checkpoint, opened.source, report))
    everything = used == "torch"
    with ExitStack() as stack:
        # Over everything it takes as long as the reference: it is gone on with where it was interrupted.
        folder = stack.enter_context(work_folder(cache, f"export-{_print(opened)}")) if everything else None
        exact = _exact(opened.source, texts, folder, report)
    if everything:
        total = sum(text.targets.size for text in texts)
        report.start("Scoring the export", total, "tokens")
        joined = Summary.joined([item.summary for item in known])
        scores = Comparison.of(exact.run.logits(report), _targets(texts), joined).split(texts)
        report.finish()
        agreed, check, version = _own_tokenizer(exported, texts), None, str(torch.__version__)
    else:
        scores, agreed, check, version = _in_runtime(used, exported, texts, known, exact, context, threads, report)

    cross: gates.Verdict = "within"
    if check and (check.kl > gates.CROSS_KL or abs(check.nll_difference) > gates.CROSS_NLL):
        cross = "out"
    least = gates.coarsest(tensors)
    suspects = [Suspicion(tensor, reason) for tensor in tensors if (reason := gates.suspicious(tensor, least))]
    suspects.sort(key=lambda suspect: -gates.severity(suspect.tensor, least))
    results = [_result(*item, bounds) for item in zip(texts, known, scores, agreed, strict=True)]
    why = "as --tolerance says" if tolerance else f"by its mix, {opened.mix}" if opened.mix else "by its bits per weight"
    notes = [
        f"Tier {bounds.name}, {why}: perplexity ratio ≤ {bounds.ppl:g}, KL divergence ≤ {bounds.kld:g}, "
        f"top-1 agreement ≥ {bounds.top1:g}, every suite on its own."
    ]
    notes.append(
        f"Windows of {context} tokens apart, second half scored, as llama-perplexity does; errors are over windows; "
        f"within or out by {gates.ERRORS:.0f} standard errors, else undecided."
    )
    if kept := opened.checkpoint.kept:
        notes.append(
            f"Of {kept.of} experts in each layer {kept.dropped} are left out. On text it is judged against the checkpoint with "
            "all of them; weights are compared with those of the experts that are there, numbered as in the export."
        )
    if len(texts[0].windows) < 2:
        notes.append("One window is too few for a standard error: verdicts on text are undecided.")
    return Report(
        exported=str(exported),
        reference=str(reference.path),
        kind=opened.kind if opened.mix is None else f"{opened.kind} {opened.mix}",
        runtime=used,
        runtime_version=version,
        tier=bounds,
        context=context,
        suites=tuple(results),
        averages=tuple(_averages(results, bounds)),
        tensors=tensors,
        suspicions=tuple(suspects),
        cross_check=check,
        cross_verdict=cross,
        layer_errors=measures.relative_errors(exact.run.layers, [each.layers for each in known]),
        coverage=exact.coverage,
        nbytes=opened.nbytes,
        reference_bytes=reference.nbytes,
        n_weights=n_weights,
        seconds=time.perf_counter() - started,
        command=command,
        versions=_versions(),
        notes=tuple(notes),
    )


def _targets(texts: Sequence[SuiteTokens]) -> measures.I64:
    return np.concatenate([text.targets.ravel() for text in texts])


@dataclass(frozen=True)
class _Exact:
    """The exact path's run; of a partial one, which covers first windows only, what the runtime must agree with."""

    run: Streamed
    coverage: tuple[tuple[int, ...], ...]
    nll: measures.F64
    summary: Summary | None


def _print(opened: Exported) -> str:
    """Changes with the files of an export, by their names, sizes and times."""
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in opened.files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:20]


def _counted(folder: Path, layer: int) -> Path:
    """Of a layer how many tokens chose each expert."""
    return folder / f"experts-{layer}.json"


def _exact(source: TypedSource, texts: Sequence[SuiteTokens], folder: Path | None, progress: Progress) -> _Exact:
    """Over everything in a `folder`, else over the first window of every text."""
    everything = folder is not None
    counts: dict[int, tuple[int, ...]] = {}

    def count(stage: Stage) -> None:
        first = stage.weights[0] if stage.weights else None
        if first and first.expert == 0 and first.role is Role.GATE and first.layer is not None:
            counts[first.layer] = tuple(stage.run.expert_tokens(0))
            if folder:  # for a run that goes on behind this layer
                replace_bytes(_counted(folder, first.layer), sealed(json.dumps(counts[first.layer]).encode()))

    chosen = [text.windows if everything else text.windows[:1] for text in texts]
    firsts = np.cumsum([0, *map(len, chosen)])[:-1].tolist()
    done = stream(StreamingModel(source), np.concatenate(chosen), firsts, progress, count, folder)
    for layer in range(source.architecture.num_layers):
        if folder and layer not in counts and (raw := read_bytes(_counted(folder, layer))) is not None:
            if (whole := unsealed(raw)) is None:
                raise ExportError(f"{_counted(folder, layer)}: damaged; remove its folder")
            counts[layer] = tuple(json.loads(whole))
    coverage = tuple(counts[layer] for layer in sorted(counts))
    if everything:
        return _Exact(done, coverage, np.empty(0), None)
    targets = np.concatenate([text.targets[:1].ravel() for text in texts])
    nll, parts = np.empty(len(targets)), []
    offsets = measures.draw_offsets(len(targets))
    for where, log_q in pieces(done.logits(Silent())):
        nll[where] = measures.nll(log_q, targets[where])
        parts.append(measures.summarise(log_q, offsets=offsets[where]))
    return _Exact(done, coverage, nll, Summary.joined(parts))


def _own_tokenizer(path: Path, texts: Sequence[SuiteTokens]) -> Sequence[float | None]:
    """What no runtime says of an export: `_agreed` of the tokenizer in its folder; None of each text where there is none."""
    if not (path / "tokenizer.json").is_file():
        return [None] * len(texts)
    tokenizer = load_tokenizer(path)
    return _agreed(path, texts, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)


def _agreed(path: Path, texts: Sequence[SuiteTokens], tokenize: Callable[[str], Sequence[int]]) -> list[float]:
    """Of every text the share of token ids that an export's tokenizer agrees on. Raises ValidationError where it is another."""
    agreed = []
    for text in texts:
        same = agreement(text.ids, [*text.ids[: text.has_bos], *tokenize(text.text)])
        if same < TOKENIZER_AGREEMENT:
            raise ValidationError(
                f"{path}: its tokenizer agrees with the reference's on {same:.1%} of the tokens of {text.name}; "
                "they do not match, export it again from this checkpoint"
            )
        agreed.append(same)
    return agreed


def _in_runtime(
    used: runtimes.RuntimeName,
    path: Path,
    texts: Sequence[SuiteTokens],
    known: Sequence[Reference],
    exact: _Exact,
    context: int,
    threads: int,
    progress: Progress,
) -> tuple[list[Scores], list[float], CrossCheck, str]:
    """Score every suite in the runtime, its first window against the exact path too."""
    scores, first_kl, first_nll = [], [], []
    with runtimes.opened(used, path, context, threads) as model:
        vocab = exact.run.model.architecture.vocab_size
        if model.vocab_size != vocab:
            raise ValidationError(
                f"{path}: {model.vocab_size} tokens in its vocabulary, the reference has {vocab}: another model"
            )
        agreed = _agreed(path, texts, model.tokenize)
        progress.start(f"Running {model.name}", sum(text.targets.size for text in texts), "tokens")
        per_window = texts[0].targets.shape[1]
        for index, (text, reference) in enumerate(zip(texts, known, strict=True)):
            rows = slice(index * per_window, (index + 1) * per_window)
            parts = []
            for number, block in enumerate(run(model, path, text.windows, progress)):
                targets = text.targets[number]
                here = slice(number * per_window, (number + 1) * per_window)
                parts.append(Comparison.of(iter([block]), targets, reference.summary[here]))
                if not number and exact.summary:
                    twin = Comparison.of(iter([block]), targets, exact.summary[rows])
                    first_kl.append(twin.kl)
                    first_nll.append(twin.nll - exact.nll[rows])
            scores.append(Scores(*(np.stack([getattr(part, key) for part in parts]) for key in ("nll", "kl", "agree"))))
        progress.finish()
        kl, difference = np.concatenate(first_kl), np.concatenate(first_nll)
        check = CrossCheck(float(kl.mean()), float(difference.mean()), len(kl))
        return scores, agreed, check, model.version


def _result(text: SuiteTokens, reference: Reference, scores: Scores, agreed: float | None, bounds: gates.Tier) -> SuiteResult:
    flat = scores.kl.ravel()
    ratio, kl = measures.perplexity_ratio(scores.nll, reference.nll), measures.window_mean(scores.kl)
    top1 = measures.window_mean(scores.agree)
    nll = measures.token_mean(scores.nll.ravel())
    perplexity = measures.exponential(nll.value)
    return SuiteResult(
        name=text.name,
        tokens=text.targets.size,
        windows=len(text.windows),
        perplexity=Estimate(perplexity, perplexity * nll.error),
        reference_perplexity=measures.perplexity(reference.nll),
        nll=nll.value,
        bits_per_byte=measures.bits_per_byte(scores.nll, text.n_bytes),
        reference_bits_per_byte=measures.bits_per_byte(reference.nll, text.n_bytes),
        ratio=Finding(ratio, bounds.ppl, gates.judge(ratio, bounds.ppl)),
        kl=Finding(kl, bounds.kld, gates.judge(kl, bounds.kld)),
        kl_99=float(np.quantile(flat, 0.99)),
        kl_max=float(flat.max()),
        top1=Finding(top1, bounds.top1, gates.judge(top1, bounds.top1, at_most=False)),
        tokenizer=agreed,
        kl_histogram=tuple(int(n) for n in np.histogram(flat, [-np.inf, *KL_EDGES, np.inf])[0]),
    )


def _averages(results: Sequence[SuiteResult], bounds: gates.Tier) -> list[SuiteResult]:
    """Means over suites, each suite counting alike; perplexities are averaged as mean log-likelihoods."""
    found = []
    groups = {name: [r for r in results if r.name.startswith(beginnings)] for name, beginnings in GROUPS.items()}
    for name, members in {**groups, "all suites": list(results)}.items():
        if len(members) < 2:
            continue

        def mean(values: Callable[[SuiteResult], float], of: Sequence[SuiteResult] = members) -> float:
            return sum(map(values, of)) / len(of)

        def together(values: Callable[[SuiteResult], Estimate], of: Sequence[SuiteResult] = members) -> Estimate:
            items = [values(result) for result in of]
            return Estimate(sum(i.value for i in items) / len(items), sqrt(sum(i.error**2 for i in items)) / len(items))

        d = together(lambda r: Estimate(log(r.ratio.value.value), r.ratio.value.error / r.ratio.value.value))
        nll = together(lambda r: Estimate(r.nll, r.perplexity.error / r.perplexity.value))
        value, perplexity = measures.exponential(d.value), measures.exponential(nll.value)
        ratio = Estimate(value, value * d.error)
        agreed = [r.tokenizer for r in members if r.tokenizer is not None]
        kl, top1 = together(lambda r: r.kl.value), together(lambda r: r.top1.value)
        found.append(
            SuiteResult(
                name=name,
                tokens=sum(r.tokens for r in members),
                windows=sum(r.windows for r in members),
                perplexity=Estimate(perplexity, perplexity * nll.error),
                reference_perplexity=measures.exponential(mean(lambda r: log(r.reference_perplexity))),
                nll=nll.value,
                bits_per_byte=mean(lambda r: r.bits_per_byte),
                reference_bits_per_byte=mean(lambda r: r.reference_bits_per_byte),
                ratio=Finding(ratio, bounds.ppl, gates.judge(ratio, bounds.ppl)),
                kl=Finding(kl, bounds.kld, gates.judge(kl, bounds.kld)),
                kl_99=mean(lambda r: r.kl_99),
                kl_max=max(r.kl_max for r in members),
                top1=Finding(top1, bounds.top1, gates.judge(top1, bounds.top1, at_most=False)),
                tokenizer=sum(agreed) / len(agreed) if agreed else None,
                kl_histogram=tuple(sum(column) for column in zip(*(r.kl_histogram for r in members), strict=True)),
            )
        )
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("xent-quant", "numpy", "torch", "gguf", "xllamacpp", "onnxruntime", "bitsandbytes", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
