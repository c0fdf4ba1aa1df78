"""The model that was quantised, as model cards speak of it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import yaml  # type: ignore[import-untyped]

from xent_quant.checkpoint.families import FAMILIES
from xent_quant.plain import markdown, plain

LARGEST_HEADER = 1 << 17
"""Bytes of a card that are read: YAML takes a second for some hundred thousand."""
KNOWN = {name: repository for family in FAMILIES.values() for name, repository in family.released.items()}


@dataclass(frozen=True)
class BaseModel:
    """What is known of the quantised model: its name, its Hub id if any, and its own card's licence and languages."""

    name: str
    repository: str | None
    licence: str | None
    licence_name: str | None
    licence_link: str | None
    languages: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """For the person: what of the card could not be read."""

    @classmethod
    def of(cls, folder: Path) -> "BaseModel":
        """Read the folder's README.md, if there is one. The Hub id comes from the Hub's cache folder, or a released
        model's name; ModelScope's cache writes a full stop as three low lines.
        """
        folder = folder.resolve()
        cached = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]", folder.as_posix() + "/")
        known = folder.name.replace("___", ".") if "modelscope" in folder.parts[-6:] else folder.name
        repository = plain(f"{cached[1]}/{cached[2]}") if cached else KNOWN.get(known)
        header, notes = _front_matter(folder / "README.md")

        def text(key: str) -> str | None:
            value = header.get(key)
            return (plain(value.strip()) or None) if isinstance(value, str) and _is_unicode(value) else None

        named = header.get("language")
        languages = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        return cls(
            name=repository.split("/")[1] if repository else plain(known),
            repository=repository,
            licence=text("license"),
            licence_name=text("license_name"),
            licence_link=text("license_link"),
            languages=tuple(plain(item) for item in languages if isinstance(item, str) and _is_unicode(item)),
            notes=notes,
        )

    @property
    def link(self) -> str:
        """The name, with its page on the Hub where that is known, in Markdown."""
        if not self.repository:
            return markdown(self.name)
        return f"[{markdown(self.repository)}](https://huggingface.co/{quote(self.repository)})"

    @property
    def terms(self) -> str:
        """A sentence on the licence."""
        terms = self.licence_name or self.licence
        return f"The weights keep the base model's licence{f' ({markdown(terms)})' if terms else '; see there'}."

    def front_matter(self, library: str, tags: Sequence[str]) -> list[str]:
        """The Hub's YAML header for a quantised model, as lines."""

        def quoted(value: object) -> str:
            return json.dumps(value, ensure_ascii=False)  # JSON strings and lists are YAML

        return [
            "---",
            f"base_model: {quoted(self.repository or self.name)}",
            "base_model_relation: quantized",
            *([f"license: {quoted(self.licence)}"] if self.licence else []),
            *([f"license_name: {quoted(self.licence_name)}"] if self.licence_name else []),
            *([f"license_link: {quoted(self.licence_link)}"] if self.licence_link else []),
            *([f"language: {quoted(list(self.languages))}"] if self.languages else []),
            f"library_name: {library}",
            "pipeline_tag: text-generation",
            f"tags: {quoted(list(tags))}",
            "---",
        ]


def _is_unicode(text: str) -> bool:
    """Whether it can be written: YAML's escapes make halves of surrogate pairs too."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _front_matter(readme: Path) -> tuple[dict[str, object], tuple[str, ...]]:
    """A card's YAML header, and a note where it is not one: licence and languages are then not known."""
    if not readme.is_file():
        return {}, ()
    with readme.open("rb") as file:
        beginning = file.read(LARGEST_HEADER).decode("utf-8", errors="replace").replace("\r\n", "\n")
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", beginning, re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-45
        first = str(error).splitlines()[0]
        return {}, (f"{readme}: its header is not YAML ({first}): the new card says nothing of licence and languages.",)
    return header if isinstance(header, dict) else {}, ()
