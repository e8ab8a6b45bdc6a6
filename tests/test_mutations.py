"""A saved model with anything changed in it gives an error of sparsec or a valid model that runs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import mutations
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.utils import logging


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A saved model of every layout, in one or two dtypes."""
    return mutations.bases(tmp_path_factory.mktemp("bases"), step=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", sorted(set(mutations.WAYS), key=str), ids=lambda way: way.__name__)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rng=st.randoms(use_true_random=True), data=st.data())
def test_what_is_changed_gives_an_error_or_a_model_that_runs(
    way: mutations.Way, rng: random.Random, data: st.DataObject, bases: list[Path], tmp_path: Path
) -> None:
    mutator = data.draw(st.sampled_from(mutations.MUTATORS))
    base = data.draw(st.sampled_from(bases))
    mutations.one(rng, base, tmp_path / "changed", mutator, way)


def test_what_is_not_changed_is_valid_in_every_way(bases: list[Path]) -> None:
    for base in bases[:: len(bases) // 4]:
        for way in set(mutations.WAYS):
            assert mutations.outcome(way, base, True) == f"{way.__name__}: valid"
