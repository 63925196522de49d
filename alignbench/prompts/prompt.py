"""A prompt as every part of the suite sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set.

    Attributes:
        id: unique within its set and stable, for example ``"shapes/test/0012"``; seeds are hashed from it.
        text: what the text encoders see.
        metadata: a GenEval record (``tag``, ``include``, optional ``exclude``, ``prompt``) or empty.
    """

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
