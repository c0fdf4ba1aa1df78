"""Which tokens begin, end and pad a text: what all of a checkpoint's files together say.

The order is that of llama.cpp's own converter (gguf-py's SpecialVocab): tokenizer_config.json, then config.json; here
special_tokens_map.json stands after the one and generation_config.json after the other. Beyond it: lists of end tokens, and a
token that only the post-processor puts before or after a text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xent_quant.checkpoint.tokenizer import ROLES, content, settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROBE = "a"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids by role, None where no file names one. `ends`: every id after which generation stops, `ids["eos"]` first.
    `add_bos`, `add_eos`: whether a text is encoded with that token around it. `notes`: what the files contradict each other in,
    or cannot be had with one token at each end."""

    ids: dict[str, int]
    ends: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    notes: tuple[str, ...]


def read(folder: Path, tokenizer: "Tokenizer", vocab_size: int) -> SpecialTokens:
    """The special tokens of a checkpoint folder, whose tokenizer is loaded and whose model has `vocab_size` tokens.

    Raises CheckpointError for a damaged file.
    """
    config = settings(folder, "tokenizer_config.json")
    models = [settings(folder, name) for name in ("config.json", "generation_config.json")]

    def known(index: Any) -> list[int]:
        values = index if isinstance(index, list) else [index]
        return [value for value in values if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size]

    found: dict[str, list[int]] = {role: [] for role in ROLES}
    for role in ROLES:
        for source in (config, settings(folder, "special_tokens_map.json")):
            text = content(source.get(f"{role}_token"))
            found[role] += known(tokenizer.token_to_id(text)) if text else []
        for source in models:
            found[role] += known(source.get(f"{role}_token_id"))
    plain = tokenizer.encode(PROBE, add_special_tokens=False).ids
    whole = tokenizer.encode(PROBE, add_special_tokens=True).ids
    start = next((at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    notes = [
        f"Hugging Face puts {tokenizer.decode(ids, skip_special_tokens=False)!r} {where} a text; llama.cpp can put one token"
        for ids, where in ((before, "before"), (after, "after"))
        if len(ids) > 1
    ]
    adds = {}
    for role, around in (("bos", before[-1:]), ("eos", after[:1])):
        found[role] = [*around, *found[role]]
        asked = config.get(f"add_{role}_token")
        adds[role] = bool(around) if not isinstance(asked, bool) else asked and bool(found[role])
        if isinstance(asked, bool) and asked != bool(around) and tokenizer.post_processor is not None:
            notes.append(f"tokenizer_config.json's add_{role}_token is {asked}, tokenizer.json's post-processor says otherwise")
    ids = {role: values[0] for role, values in found.items() if values}
    return SpecialTokens(ids, tuple(dict.fromkeys(found["eos"])), adds["bos"], adds["eos"], tuple(notes))
