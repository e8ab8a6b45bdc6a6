"""transformers' own progress bars and advice, off for a while: a bar in a pipe is noise, the advice is on calls of ours."""

from __future__ import annotations

import logging as standard
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers shows no progress bars and no warnings; what goes wrong it raises."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    accelerate = standard.getLogger("accelerate")
    before = accelerate.level
    accelerate.setLevel(standard.ERROR)
    logging.disable_progress_bar()
    logging.set_verbosity(max(level, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(level)
        accelerate.setLevel(before)
        if shown:
            logging.enable_progress_bar()
