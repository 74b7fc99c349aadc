"""A state as the pages show it: shape + word + colour, never colour alone (the dashboard's one vocabulary)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """``shape``: one character; ``tone``: a class of the style sheet; ``word``: what is read out."""

    shape: str
    tone: str
    word: str
