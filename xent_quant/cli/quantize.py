"""`xent-quant MODEL`: the main command."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from xent_quant.cli.options import (
    CALIBRATION,
    EXIT_OUT_OF_TOLERANCE,
    Calib,
    CalibMix,
    Device,
    Json,
    Seed,
    SeqLen,
    TextField,
    Tokens,
    Verbose,
    parse_tokens,
)

if TYPE_CHECKING:
    from xent_quant.validation.report import Report

QUANTISE = Group("What to make", sort_key=1)
TENSORS = Group("Which type each tensor gets", sort_key=2)
ONNX = Group("ONNX only", sort_key=3)
WRITING = Group("Where and how to write", sort_key=4)


def quantize(
    model: Annotated[
        str | None,
        Parameter(help="Checkpoint folder, or Hub id such as xverse/XVERSE-Ent-A4.2B. Default: the bundled miniature."),
    ] = None,
    /,
    *,
    bits: Annotated[
        Literal[2, 3, 4, 5, 6, 8, 16], Parameter(group=QUANTISE, help="Bits per weight, roughly; picks the mix.")
    ] = 4,
    format: Annotated[
        list[Literal["gguf", "onnx", "bnb"]],
        Parameter(group=QUANTISE, negative="", consume_multiple=False, help="File format; repeatable."),
    ] = ["gguf"],  # noqa: B006  (cyclopts shows the default; it is never mutated)
    bnb_type: Annotated[
        Literal["nf4", "fp4"], Parameter(group=QUANTISE, help="bitsandbytes' type for 4 bits (--format bnb).")
    ] = "nf4",
    imatrix: Annotated[
        Path | None,
        Parameter(group=CALIBRATION, help="Importance matrix (llama-imatrix's GGUF format) to use instead of text."),
    ] = None,
    method: Annotated[
        Literal["auto", "rtn", "imatrix", "gptq"],
        Parameter(
            group=CALIBRATION,
            help="How codes are chosen: rtn without statistics, imatrix by importance of columns, gptq with error feedback. "
            "auto: gptq; imatrix for Q2_K, where gptq measured no better, and with --imatrix.",
        ),
    ] = "auto",
    calib: Calib = [],  # noqa: B006
    calib_mix: CalibMix = None,
    text_field: TextField = "text",
    tokens: Tokens = "128k",
    seqlen: SeqLen = 512,
    seed: Seed = 0,
    device: Device = "auto",
    effort: Annotated[
        Literal["fast", "normal", "high"], Parameter(group=QUANTISE, help="How long to search for scales and codes.")
    ] = "normal",
    type: Annotated[
        str | None, Parameter(group=TENSORS, help="A type or mix by its llama.cpp name (Q4_K_M), instead of --bits.")
    ] = None,
    tensor_type: Annotated[
        list[str],
        Parameter(
            group=TENSORS,
            negative="",
            consume_multiple=False,
            show_default=False,
            help="REGEX=TYPE on GGUF tensor names; repeatable, first match wins.",
        ),
    ] = [],  # noqa: B006
    pad: Annotated[
        Literal["auto", "never"],
        Parameter(group=TENSORS, help="Zero-pad the expert width where that saves bytes; the function stays the same."),
    ] = "auto",
    onnx_dtype: Annotated[
        Literal["fp32", "fp16", "bf16"], Parameter(group=ONNX, help="What the graph computes in. bf16: GPUs only.")
    ] = "fp16",
    block_size: Annotated[Literal[32, 64, 128], Parameter(group=ONNX, help="Weights that share a scale.")] = 64,
    accuracy_level: Annotated[
        Literal[0, 4], Parameter(group=ONNX, help="4: CPU kernels may round activations to INT8, faster. 0: exact.")
    ] = 4,
    symmetric: Annotated[
        bool, Parameter(group=ONNX, negative="--asymmetric", help="Without or with a zero point for every block.")
    ] = True,
    active_bits: Annotated[
        Literal[4, 8, 16] | None,
        Parameter(group=ONNX, help="Bits of attention, shared experts, embedding and head. Default: 8, or 16 with --bits 16."),
    ] = None,
    output: Annotated[Path, Parameter(group=WRITING, help="Folder for the results.")] = Path("out"),
    name: Annotated[str | None, Parameter(group=WRITING, help="Name of the model in file names. Default: the folder's.")] = None,
    split_size: Annotated[str | None, Parameter(group=WRITING, help="Split into shards of at most this size, e.g. 4G.")] = None,
    allow_tokenizer_mismatch: Annotated[
        bool,
        Parameter(group=WRITING, negative="", help="Export a tokenizer that llama.cpp cannot reproduce exactly; say where."),
    ] = False,
    threads: Annotated[int | None, Parameter(group=WRITING, help="CPU threads. Default: all.")] = None,
    force: Annotated[bool, Parameter(group=WRITING, negative="", help="Replace existing output.")] = False,
    dry_run: Annotated[
        bool,
        Parameter(group=WRITING, negative="", help="Print every tensor, its type and bytes, and the VRAM needed; write nothing."),
    ] = False,
    validate: Annotated[
        bool,
        Parameter(
            group=WRITING,
            negative="",
            help="Then measure every export against MODEL on the six suites; reports in OUTPUT/validation; exit 3 if one is out.",
        ),
    ] = False,
    json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Quantise MODEL and export it."""
    from xent_quant import pipeline
    from xent_quant.cli import show

    options: dict[str, Any] = {
        "bits": bits,
        "type": type,
        "tensor_types": tensor_type,
        "imatrix": imatrix,
        "method": method,
        "pad": pad,
        "onnx_dtype": onnx_dtype,
        "block_size": block_size,
        "accuracy_level": accuracy_level,
        "symmetric": symmetric,
        "active_bits": active_bits,
        "bnb_type": bnb_type,
    }
    if model is None:
        show.note("No MODEL given: using the bundled miniature, xent-mini.")
    if dry_run:
        plans = pipeline.plan(model, formats=format, **options)
        show.as_json([plan.to_json() for plan in plans]) if json else show.plans(plans)
        return
    if validate:
        pipeline.require_runtimes(format, bits)
    from calibration.session import Settings  # torch: seconds that --dry-run can do without

    with show.progress() as progress:
        result = pipeline.quantize(
            model,
            formats=format,
            effort=effort,
            output=output,
            name=name,
            allow_tokenizer_mismatch=allow_tokenizer_mismatch,
            split_size=show.parse_size(split_size) if split_size else None,
            threads=threads,
            force=force,
            calibration=Settings(calib, calib_mix, text_field, parse_tokens(tokens), seqlen, seed, device),
            progress=progress,
            **options,
        )
    if not json:
        show.result(result)
    reports = _validate(result.exports, model, output, threads, json) if validate else []
    if json:
        show.as_json(result.to_json() | ({"validation": [report.to_json() for report in reports]} if validate else {}))
    if any(report.verdict == "out" for report in reports):
        sys.exit(EXIT_OUT_OF_TOLERANCE)


def _validate(exports: Sequence[Path], model: str | None, output: Path, threads: int | None, json: bool) -> "list[Report]":
    """Reports of the exports; their references are computed once."""
    from xent_quant import pipeline
    from xent_quant.cli import show, show_validation

    reports = []
    for path in exports:
        folder = output / "validation" / path.stem
        with show.progress() as progress:
            report = pipeline.validate(
                path,
                model,
                threads=threads,
                report=folder,
                cache=output / "validation" / "references",
                command=shlex.join(["xent-quant", *sys.argv[1:]]),
                progress=progress,
            )
        if not json:
            show.out.print()
            show_validation.report(report, folder)
        reports.append(report)
    return reports
