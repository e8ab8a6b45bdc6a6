"""Why a model's step has no program."""

from __future__ import annotations


class NotServedError(Exception):
    """A step, or a part of it, that no program computes; it runs as the model's own code. str() says what stood in the way."""
