"""What bundled text adds to a person's own: where that runs out, and in a language that it lacks.

Both are worth much more than they cost (docs/calibration.md, Little text): on English alone, GPTQ makes a model of two languages
worse than a plain search does, and with an eighth of Chinese beside it, half as bad.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibration.text import LANGUAGES, CalibrationText, bundled, more_text, weights_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ONE_LANGUAGE = 0.02
"""With fewer than this share of English words, or of Chinese characters, among both, text lacks the language."""

LOOKED_AT = 64
"""Windows, or some more, that tell a text's languages."""

LANGUAGE_SHARE = 8
"""The language that text lacks gets one window for so many of the text's, and so many at least."""

CALLED = {"zh": "Chinese", "en": "English"}

Load = Callable[..., CalibrationText]
"""`calibration.text.load` with all but sources, `tokens` and `spare`."""


def supplemented(
    own: CalibrationText, tokenizer: "Tokenizer", load: Load, *, mix: str | None, tokens: int, spare: int, chinese: bool
) -> CalibrationText:
    """`own` text with bundled text behind it until there are `tokens` (and up to `spare` spare ones more), and with the language
    that it then still lacks; its notes say so. Suites that the `mix` gives no weight stay out. `chinese`: see
    `calibration.text.is_chinese`. Raises CalibrationError for a mix that is none."""
    length, found = own.windows.shape[1], own
    suites = bundled(weights_of(mix, chinese), without=own.names)
    room = tokens // length - len(own.windows)
    if room > 0 and suites:
        more = load(suites, tokens=room * length, spare=spare)
        found = _joined(own, more).told(
            f"--tokens asks for {tokens:,}, the text has {own.windows.size:,}: {more.windows.size:,} of the bundled text fill up "
            f"(--tokens {own.windows.size} leaves them out)"
        )
    if len(found.windows) < tokens // length:
        found = found.told(
            f"--tokens asks for {tokens:,}, and there are {found.windows.size:,}: experts that are rarely chosen see fewer rows "
            f"than their weights have columns, which costs quality; more text ({more_text(found.names)}) would bring them closer"
        )
    language = lacking(tokenizer, found.windows, chinese)
    suites = [source for source in suites if source.name.endswith(f"-{language}")]
    if language and suites:
        windows = max(LANGUAGE_SHARE, len(found.windows) // LANGUAGE_SHARE)
        more, called = load(suites, tokens=windows * length), CALLED[language]
        found = _joined(found, more).told(
            f"the text has next to no {called}, without which {called} suffers: {more.windows.size:,} tokens of the bundled text "
            f"go with it (--calib-mix {language}=0 leaves them out)"
        )
    return found


def lacking(tokenizer: "Tokenizer", windows: NDArray[np.int64], chinese: bool) -> str | None:
    """The one of LANGUAGES of which text [n, length] has next to nothing, and the model knows more."""
    text = "".join(tokenizer.decode_batch(windows[:: len(windows) // LOOKED_AT + 1].tolist()))
    words = {"zh": len(re.findall("[一-鿿]", text)), "en": len(re.findall("[A-Za-z]+", text))}
    rare = (language for language in LANGUAGES if words[language] < ONE_LANGUAGE * sum(words.values()))
    return next((language for language in rare if chinese or language == "en"), None)


def _joined(own: CalibrationText, more: CalibrationText) -> CalibrationText:
    """One behind the other."""
    windows, spare = (np.concatenate(pair) for pair in ((own.windows, more.windows), (own.spare, more.spare)))
    return CalibrationText(windows, spare, (*own.names, *(name for name in more.names if name not in own.names)), own.notes)
