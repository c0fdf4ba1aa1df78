#!/usr/bin/env python3
"""Prints how many tokens of calibration text each expert sees: of the bundled text, or of --calib.

    scripts/expert_rows.py MODEL [--layers 2] [--calib TEXT]… [--calib-mix MIX] [--tokens 128k]

The text is drawn as `xent-quant MODEL` draws it, and runs through the first layers as
they are. Of the last one only what routing takes is computed. Holds what the forward pass holds; its states lie in a folder
that is removed.
"""

import argparse
import tempfile
from contextlib import suppress
from pathlib import Path

from _walk import first_layers

from calibration.coverage import Coverage
from calibration.rare import FEWEST_ROWS, fewest_rows
from calibration.session import Session
from xent_quant.checkpoint.hub import resolve
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.model.stages import Stage
from xent_quant.model.streaming import StreamingModel
from xent_quant.options import CalibrationOptions
from xent_quant.tensors import Role


class _Routed(Exception):
    """The last layer's tokens have their experts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id of a mixture of experts")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--calib", action="append", default=[], help="as of xent-quant; default: the bundled text")
    parser.add_argument("--calib-mix")
    parser.add_argument("--tokens", default=CalibrationOptions.tokens)
    options = parser.parse_args()
    checkpoint = first_layers(Checkpoint.open(resolve(options.model)), options.layers)
    model = checkpoint.architecture
    columns = max(model.hidden_size, model.intermediate_size)
    fewest = fewest_rows(columns, hessian=True)
    settings = CalibrationOptions(calib=tuple(options.calib), calib_mix=options.calib_mix, tokens=options.tokens)
    session = Session(checkpoint, settings)
    windows = session.windows(FEWEST_ROWS)
    coverage = Coverage(model.num_layers, model.num_experts, fewest)

    def observe(stage: Stage) -> None:
        first = stage.weights[0] if stage.weights else None
        if first and first.role is Role.GATE and first.expert == 0 and first.layer is not None:
            coverage.count(first.layer, stage.run.expert_tokens(0))
            if first.layer == model.num_layers - 1:
                raise _Routed

    with tempfile.TemporaryDirectory() as folder, suppress(_Routed):
        StreamingModel(checkpoint).run(windows, observe, folder=Path(folder))
    print(f"{windows.numel():,} tokens of {', '.join(session.text.names)}; {columns:,} columns")
    for note in session.notes:
        print(f"note: {note}")
    print("| layer | fewest | median | most | fewer than columns |\n|---|---|---|---|---|")
    for row in coverage.rows():
        print(f"| {row.layer + 1} | {row.least:,} | {row.middle:,.0f} | {row.most:,} | {row.rare} |")


if __name__ == "__main__":
    main()
