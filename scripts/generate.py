#!/usr/bin/env python3
"""Lets stock llama.cpp continue a prompt with a GGUF file, greedily: `scripts/generate.py FILE.gguf [--prompt TEXT]`."""

import argparse
from pathlib import Path

from xent_quant.validation.llama_cpp import LlamaCpp

PROMPTS = ("The old lamp in the window", "夜色渐深，他推开门，")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompt", action="append", help="default: one in English, one in Chinese")
    parser.add_argument("--tokens", type=int, default=60)
    options = parser.parse_args()
    with LlamaCpp(options.file, context=512, threads=2) as llama:
        for prompt in options.prompt or PROMPTS:
            ids = llama.tokenize(prompt, add_special=True)
            print(f"\n{llama.detokenize(ids + llama.generate(ids, options.tokens))}")


if __name__ == "__main__":
    main()
