#!/usr/bin/env python3
"""Compares planned files with the mixes by name, of a model whose sensitivity was measured: KL divergence at the same bytes.

    scripts/bench_plans.py --sensitivity FILE [--model DIR] [--mixes XENT5 XENT4 ...] [--budgets XENT5 XENT4 ...]
                           [--format gguf|onnx|bnb] [--method gptq] [--tokens 32768] [--calib-mix MIX] [--judge-tokens 2048]

FILE is what `xent-quant sensitivity` or scripts/check_sensitivity.py wrote (the miniature's own is
xent_quant/data/sensitivity-prior.json); without one the prior is used. A budget is the tensor data of a mix: the plan takes no
more. Of ONNX and bitsandbytes the mixes are those that options can name, and the budgets sizes of the best plans, as many as
--budgets. Both sides are quantised by --method with statistics of the bundled calibration text, and judged in our own exact
forward on --judge-tokens of every bundled suite, as of scripts/bench_quality.py: KL(checkpoint ‖ quantised) in nats per token,
± the standard error over windows. "best" is the mix of least measured divergence among those of no more bytes; the ratio is
over the same windows. Holds the model in float32.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from _walk import quantised
from bench_quality import judge

from calibration.text import load, sources
from exporters import budgets
from exporters.bitsandbytes import budget as bnb_budget
from exporters.bitsandbytes.plan import BnbPlan
from exporters.bitsandbytes.plan import plan as bnb_plan
from exporters.gguf.budget import Goal, planned
from exporters.gguf.plan import GGUFPlan, plan
from exporters.onnx import budget as onnx_budget
from exporters.onnx.plan import ONNXPlan, Settings
from exporters.onnx.plan import plan as onnx_plan
from xent_quant import sensitivities
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.hub import resolve
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.methods import METHODS
from xent_quant.model.streaming import StreamingModel
from xent_quant.recipes import recipe
from xent_quant.sensitivities import Sensitivity
from xent_quant.validation import measures, suites

LENGTH = 256
MIXES = ["XENT6", "Q6_K", "XENT5", "Q5_K_M", "XENT4", "Q4_K_M", "IQ4_XS", "XENT3", "Q3_K_M", "XENT2", "Q2_K"]
BUDGETS = ["Q6_K", "XENT5", "XENT4", "XENT3", "XENT2", "Q2_K"]


class GGUF:
    """Mixes by llama.cpp's names and ours, and plans, of one model."""

    def __init__(self, model: Architecture, known: Sensitivity, method: str, names: list[str]) -> None:
        self._model, self._known, self._method = model, known, method
        self.plans: dict[str, Planned] = {name: plan(model, recipe(type=name, imatrix=True)) for name in names}

    def within(self, nbytes: int) -> "Planned":
        """The plan for so many bytes."""
        return planned(self._model, self._known, Goal(name="", size=nbytes), method=self._method, compare=False)

    def budgets(self, names: list[str]) -> dict[str, int]:
        """Bytes of mixes."""
        return {name: size(self.plans[name]) for name in names}


class _Named:
    """The same of a format for which names of mixes are fixed."""

    plans: "dict[str, Planned]"

    def within(self, nbytes: int) -> "Planned":
        """The plan for so many bytes."""
        raise NotImplementedError

    def budgets(self, names: list[str]) -> dict[str, int]:
        """Bytes of as many of the best plans, smallest first."""
        expected = self.within(max(map(size, self.plans.values()))).expected
        assert expected is not None
        curve = [nbytes for nbytes, loss in expected.frontier[1:] if loss][:-1]  # the ends are mixes
        chosen = sorted({round(place) for place in np.linspace(0, len(curve) - 1, len(names))})
        return {f"{curve[place] / 2**20:.2f} MiB": curve[place] for place in chosen}


class BNB(_Named):
    """bitsandbytes in 4 bits, and whole."""

    def __init__(self, model: Architecture, known: Sensitivity, method: str) -> None:
        self._model, self._known, self._gptq = model, known, method == "gptq"
        self.plans = {"NF4": bnb_plan(model), "BF16": bnb_plan(model, bits=16)}

    def within(self, nbytes: int) -> "Planned":
        """The plan for so many bytes."""
        goal = budgets.Goal(name="", size=nbytes)
        return bnb_budget.planned(self._model, self._known, goal, bits=4, bnb_type="nf4", gptq=self._gptq)


class ONNX(_Named):
    """ONNX in 4 and 8 bits."""

    def __init__(self, model: Architecture, known: Sensitivity, method: str) -> None:
        self._model, self._known, self._method, self._settings = model, known, method, Settings()
        self.plans = {
            name: onnx_plan(model, Settings(bits=experts, active_bits=others))
            for name, (experts, others) in onnx_budget.MIXES.items()
        }

    def within(self, nbytes: int) -> "Planned":
        """The plan for so many bytes."""
        goal = budgets.Goal(name="", size=nbytes)
        return onnx_budget.planned(self._model, self._known, goal, self._settings, method=self._method)


Planned = GGUFPlan | ONNXPlan | BnbPlan


def size(of: Planned) -> int:
    """Bytes that are compared."""
    return of.data_bytes if isinstance(of, ONNXPlan) else of.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder or Hub id; default: the bundled miniature")
    parser.add_argument("--sensitivity", type=Path)
    parser.add_argument("--mixes", nargs="+", help="of GGUF")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, help="mixes whose bytes are budgets")
    parser.add_argument("--format", default="gguf", choices=["gguf", "onnx", "bnb"])
    parser.add_argument("--method", default="gptq", choices=list(METHODS))
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration text")
    parser.add_argument("--judge-tokens", type=int, default=2048, help="of each suite")
    parser.add_argument("--calib-mix")
    options = parser.parse_args()
    if options.mixes and options.format != "gguf":
        parser.error(f"--mixes: those of {options.format} are fixed")

    checkpoint = Checkpoint.open(resolve(options.model))
    model, tokenizer = checkpoint.architecture, load_tokenizer(checkpoint.path)
    text = load(
        sources([], options.calib_mix, chinese=True), tokenizer, tokens=options.tokens, length=LENGTH, bos=model.bos_token_id
    )
    windows = torch.from_numpy(text.windows)
    ids = [tokenizer.encode(suite.text, add_special_tokens=False).ids for suite in suites.choose()]
    judged = torch.from_numpy(np.concatenate([measures.windows(part[: options.judge_tokens], LENGTH) for part in ids]))
    reference = StreamingModel(checkpoint)
    known = sensitivities.of(checkpoint, options.sensitivity) if options.sensitivity else sensitivities.prior(model)

    def measured(chosen: Planned) -> np.ndarray:
        """KL divergence, mean of each window."""
        measuring = {} if options.method == "rtn" else {"windows": windows}
        weights = quantised(checkpoint, chosen.slots(), METHODS[options.method]("normal"), **measuring)
        return np.asarray(judge(reference, StreamingModel(weights), judged)["kl"]).mean(1)

    if options.format == "gguf":
        compared = options.mixes or MIXES
        made: GGUF | _Named = GGUF(model, known, options.method, list(dict.fromkeys([*compared, *options.budgets])))
    else:
        made = {"onnx": ONNX, "bnb": BNB}[options.format](model, known, options.method)
        compared = list(made.plans)
    mixes = {}
    for name in compared:
        mixes[name] = measured(made.plans[name])
        mean, error = mixes[name].mean(), mixes[name].std(ddof=1) / len(judged) ** 0.5
        print(f"{name}: {size(made.plans[name])} bytes, KL {mean:.6f} ± {error:.6f}", flush=True)
    print(f"\nsensitivity: {known.source}")
    print("| budget | bytes | bits | KL·10³ expected | KL·10³ plan | best mix | its bytes | KL·10³ | ratio |\n|" + "---|" * 9)
    weights = sum(tensor.n_weights for tensor in model.tensors().values())
    for name, budget in made.budgets(options.budgets).items():
        chosen = made.within(budget)
        assert chosen.expected is not None
        ours = measured(chosen)
        best = min((each for each in compared if size(made.plans[each]) <= budget), key=lambda each: mixes[each].mean())
        theirs = mixes[best]
        ratio = ours.mean() / theirs.mean()
        error = (ours - ratio * theirs).std(ddof=1) / len(judged) ** 0.5 / theirs.mean()
        spread = ours.std(ddof=1) / len(judged) ** 0.5
        print(
            f"| {name} | {size(chosen)} | {8 * size(chosen) / weights:.2f} | {1e3 * chosen.expected.kl:.3f} | "
            f"{1e3 * ours.mean():.3f} ± {1e3 * spread:.3f} | {best} | {size(made.plans[best])} | {1e3 * theirs.mean():.3f} | "
            f"{ratio:.3f} ± {error:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
