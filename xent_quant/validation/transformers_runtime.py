"""A folder in stock transformers on the CPU: bitsandbytes exports, and float checkpoints."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import ValidationError

F32 = NDArray[np.float32]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class TransformersModel:
    """A loaded causal model. Raises ValidationError where transformers refuses it."""

    name = "transformers"

    def __init__(self, folder: Path, *, quantised: bool) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_default_handler()  # which writes a model's names to standard error as they are
        transformers.utils.logging.enable_propagation()
        self.version: str = transformers.__version__
        dtype = torch.bfloat16 if quantised else torch.float32
        loader = transformers.AutoModelForCausalLM
        try:
            self._model = loader.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()
        except Exception as error:  # transformers and bitsandbytes raise what they like
            raise ValidationError(f"{folder}: transformers refuses it: {_one_line(error)}") from error
        self._torch, self._folder = torch, folder
        self._tokenizer = load_tokenizer(folder)
        self.vocab_size = int(self._model.config.vocab_size)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def logits(self, ids: list[int], first: int = 0) -> F32:
        """[len(ids) − first, vocab] float32 of one sequence."""
        try:
            with self._torch.no_grad():
                found = self._model(self._torch.tensor([ids]), use_cache=False, logits_to_keep=len(ids) - first)
        except Exception as error:  # as above: its config may name other layers to quantise than are quantised
            raise ValidationError(f"{self._folder}: transformers cannot run it: {_one_line(error)}") from error
        logits: F32 = found.logits[0].float().numpy()
        return logits
