#!/usr/bin/env python3
"""Perplexity of ONNX exports in stock ONNX Runtime on the CPU, suite by suite, against the same model in float32.

    scripts/perplexity_onnx.py --corpus DIR [--model DIR] [--calibration DIR] [--windows 40] [--context 512]

DIR holds one text a suite: NAME.txt, or NAME.jsonl whose lines have a field `text`. Windows, and what of them is scored, are
llama-perplexity's. Compared are the defaults of `--bits 8` and `--bits 4` with and without calibration, asymmetric groups,
and rounding to nearest by ONNX Runtime's own block-wise quantisers, which is what onnxruntime-genai's builder does. A ratio
is the perplexity over that of `--bits 16 --onnx-dtype fp32`; KL is the mean of KL(float32 ‖ export) per token, in nats.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from onnxruntime.capi import _pybind_state as stock

import xent_quant
from calibration.documents import documents
from calibration.session import Windows
from exporters.onnx.export import ONNXExporter
from exporters.onnx.plan import Settings, plan
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.formats.base import F32, U8, QuantFormat
from xent_quant.formats.int_group import IntGroup
from xent_quant.methods.gptq import GPTQ
from xent_quant.methods.interface import Method
from xent_quant.methods.search import Search
from xent_quant.tensors import InputStatistics
from xent_quant.validation import measures
from xent_quant.validation.onnx_runtime import OnnxModel
from xent_quant.walk.job import run

BUNDLED = Path(xent_quant.__file__).parent / "data" / "calibration"


class StockNearest:
    """Rounding to nearest by ONNX Runtime's quantisers."""

    name = "stock nearest"
    needs_hessian = False

    def quantize(
        self, weights: F32, kind: QuantFormat, statistics: InputStatistics | None, *, name: str, pull: F32 | None = None
    ) -> U8:
        if not isinstance(kind, IntGroup):
            return kind.quantize(weights, name=name)
        (rows, columns), groups = weights.shape, weights.shape[1] // kind.group_size
        dtype = np.float16 if kind.scale_type == "F16" else np.float32
        codes = np.zeros((rows, groups, kind.group_size * kind.bits // 8), np.uint8)
        scales = np.zeros((rows, groups), dtype)
        zeros = np.zeros((rows, (groups * kind.bits + 7) // 8), np.uint8)
        transposed = np.ascontiguousarray(weights.T.astype(dtype))
        quantizer = stock.quantize_matmul_4bits if kind.bits == 4 else stock.quantize_matmul_8bits
        quantizer(codes, transposed, scales, zeros, kind.group_size, rows, columns, kind.symmetric)
        if kind.bits == 4:
            zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(rows, -1)
        parts = [codes, scales.view(np.uint8).reshape(rows, groups, -1)]
        if not kind.symmetric:
            parts.append(zeros[:, :groups, None])
        return np.concatenate(parts, axis=2).reshape(rows, -1)


@dataclass(frozen=True)
class Variant:
    name: str
    settings: Settings
    method: Method
    calibrated: bool = False


def variants() -> list[Variant]:
    int4, int8 = Settings(), Settings(bits=8)
    return [
        Variant("INT8, nearest", int8, StockNearest()),
        Variant("INT8, search", int8, Search()),
        Variant("INT8, search, calibrated", int8, Search(), True),
        Variant("INT8, GPTQ", int8, GPTQ(), True),
        Variant("INT4, nearest", int4, StockNearest()),
        Variant("INT4, search", int4, Search()),
        Variant("INT4, search, calibrated", int4, Search(), True),
        Variant("INT4, GPTQ", int4, GPTQ(), True),
        Variant("INT4 asymmetric, nearest", Settings(symmetric=False), StockNearest()),
        Variant("INT4 asymmetric, search, calibrated", Settings(symmetric=False), Search(), True),
        Variant("INT4 asymmetric, GPTQ", Settings(symmetric=False), GPTQ(), True),
        Variant("INT4, search, calibrated, fp32, level 0", Settings(onnx_dtype="fp32", accuracy_level=0), Search(), True),
    ]


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every file, jsonl lines as paragraphs."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".jsonl":
            lines = path.read_text("utf-8").split("\n")
            yield path.stem, "\n\n".join(json.loads(line)["text"] for line in lines if line.strip())
        elif path.suffix == ".txt":
            yield path.stem, "\n\n".join(documents(path))


def write(checkpoint: Checkpoint, variant: Variant, windows: torch.Tensor, output: Path) -> OnnxModel:
    exporter = ONNXExporter(checkpoint, plan(checkpoint.architecture, variant.settings), output, "model", variant.method)
    run(checkpoint, [exporter], output, text=Windows(windows) if variant.calibrated else None, force=True)
    return OnnxModel(output / "onnx")


def log_probabilities(model: OnnxModel, windows: np.ndarray) -> Iterator[np.ndarray]:
    """Of the scored positions of each window, [n, vocab] float64."""
    positions, _ = measures.scored(windows.shape[1])
    for window in windows:
        yield measures.log_softmax(model.logits(window.tolist())[positions])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=miniature())
    parser.add_argument("--calibration", type=Path, default=BUNDLED, help="same layout; default: the bundled text")
    parser.add_argument("--windows", type=int, default=40, help="windows scored a suite; fewer where it is shorter")
    parser.add_argument("--calibration-windows", type=int, default=32, help="windows used of every calibration text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--only", help="variants whose name holds this")
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.model)
    _, targets = measures.scored(arguments.context)
    with tempfile.TemporaryDirectory(prefix="perplexity-onnx-") as temporary:
        output = Path(temporary)
        reference = write(checkpoint, Variant("float32", Settings(bits=16, onnx_dtype="fp32"), Search()), torch.empty(0), output)

        def cut(text: str, count: int) -> np.ndarray:
            return measures.windows(reference.tokenize(text), arguments.context)[:count]

        suites = {name: cut(text, arguments.windows) for name, text in texts(arguments.corpus)}
        if not suites:
            parser.error(f"--corpus {arguments.corpus}: no .jsonl and no .txt in it")
        calibration = [cut(text, arguments.calibration_windows) for _, text in texts(arguments.calibration)]
        windows = torch.from_numpy(np.concatenate(calibration))
        # Held to the end, hence float32: 4 MB a window of the miniature.
        known = {name: [log.astype(np.float32) for log in log_probabilities(reference, cut)] for name, cut in suites.items()}
        scored = sum(len(cut) for cut in suites.values()) * len(range(*targets.indices(arguments.context)))
        print(f"{arguments.model.name}: {scored} scored tokens, windows of {arguments.context}; {len(windows)} of calibration")
        print(f"| export | {' | '.join(suites)} | mean ratio | largest | KL |")
        print("|---" * (len(suites) + 4) + "|")

        def nlls(name: str, found: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([measures.nll(log, cut[targets]) for log, cut in zip(found, suites[name], strict=True)])

        base = {name: measures.perplexity(nlls(name, found)) for name, found in known.items()}
        print(f"| float32, perplexity | {' | '.join(f'{value:.3f}' for value in base.values())} | | | |", flush=True)
        for variant in variants():
            if arguments.only and arguments.only not in variant.name:
                continue
            model, ratios, kl = write(checkpoint, variant, windows, output), [], []
            for name, cut in suites.items():
                found = list(log_probabilities(model, cut))
                ratios.append(measures.perplexity(nlls(name, found)) / base[name])
                kl += [measures.kl_divergence(p, q).mean() for p, q in zip(known[name], found, strict=True)]
            cells = " | ".join(f"{ratio:.4f}" for ratio in ratios)
            print(f"| {variant.name} | {cells} | {np.mean(ratios):.4f} | {max(ratios):.4f} | {np.mean(kl):.5f} |", flush=True)


if __name__ == "__main__":
    main()
