"""How many calibration tokens each expert saw."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class LayerCoverage:
    """Tokens per expert of one layer: the least, the middle and the most; experts never reached and below the floor."""

    layer: int
    least: int
    middle: float
    most: int
    never: int
    rare: int


@dataclass
class Coverage:
    """Tokens by layer and expert. Below `floor` an expert's statistics are made up with its layer's."""

    layers: int
    experts: int
    floor: int
    tokens: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = [[0] * self.experts for _ in range(self.layers)]

    def count(self, layer: int, tokens: Sequence[int]) -> None:
        """The tokens that reached each expert of a layer."""
        self.tokens[layer] = list(tokens)

    def rows(self) -> list[LayerCoverage]:
        return [
            LayerCoverage(
                layer,
                min(counts),
                median(counts),
                max(counts),
                sum(count == 0 for count in counts),
                sum(count < self.floor for count in counts),
            )
            for layer, counts in enumerate(self.tokens)
            if counts
        ]

    @property
    def least(self) -> int:
        """Tokens of the expert that saw fewest; 0 for a dense model."""
        return min((row.least for row in self.rows()), default=0)

    def notes(self) -> tuple[str, ...]:
        """What a person should know about rare experts."""
        rows = self.rows()
        rare, never = sum(row.rare for row in rows), sum(row.never for row in rows)
        if not rare:
            return ()
        total = self.layers * self.experts
        return (
            f"{rare} of {total} experts saw fewer than {self.floor} calibration tokens ({never} saw none): their statistics are "
            "made up with their layer's. More text (--calib, --tokens) would measure them.",
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "floor": self.floor,
            "experts": self.tokens,
            "layers": [
                {
                    "layer": row.layer,
                    "min": row.least,
                    "median": row.middle,
                    "max": row.most,
                    "never": row.never,
                    "below_floor": row.rare,
                }
                for row in self.rows()
            ],
        }
