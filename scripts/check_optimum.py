#!/usr/bin/env python3
"""Loads an exported ONNX folder with optimum and lets it generate, in an environment of its own.

    python -m venv optimum && optimum/bin/pip install torch==2.13.0
    optimum/bin/pip install optimum-onnx "transformers<4.58" "onnxruntime>=1.31"
    optimum/bin/python scripts/check_optimum.py out/onnx [--prompt TEXT] [--tokens 64]

optimum-onnx pins transformers below 4.58, so it cannot live beside transformers 5. Checked is that its greedy tokens are
those of one ONNX Runtime session fed by hand with the whole text; exits 1 where they differ. Needs nothing of xent-quant.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from tokenizers import Tokenizer


def likeliest(session: onnxruntime.InferenceSession, ids: list[int]) -> list[int]:
    """The likeliest next token after every prefix of `ids`, in one call without a cache."""
    feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), dtype)
    return session.run(["logits"], feed)[0][0].argmax(-1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", action="append", help="repeatable; default: one in English, one in Chinese")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    model = ORTModelForCausalLM.from_pretrained(arguments.folder)
    session = onnxruntime.InferenceSession(str(arguments.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    failed = False
    for prompt in arguments.prompt or ["The old lamp in the window", "夜色渐深，他推开门"]:
        ids = tokenizer.encode(prompt).ids
        output = model.generate(torch.tensor([ids]), max_new_tokens=arguments.tokens, do_sample=False, repetition_penalty=1.0)[
            0
        ].tolist()
        expected = likeliest(session, output)[len(ids) - 1 : -1]
        same = expected == output[len(ids) :]
        failed |= not same
        print(f"{'same tokens' if same else 'DIFFERENT TOKENS'}: {tokenizer.decode(output)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
