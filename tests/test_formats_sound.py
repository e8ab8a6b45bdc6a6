"""The fast look at positions finds exactly what the slow one names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from format_cases import LAYOUTS, some
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsec.formats import bsr, csr, nm

POSITIONS = {"csr": "col_idx", "bsr": "col_idx", "nm": "index"}
FAST = ((csr, "ascending"), (csr, "distances_ascend"), (bsr, "ascending"), (nm, "slots_ascend"))
NAMES = [name for name, case in LAYOUTS.items() if case.kind.format in POSITIONS]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_spoilt_is_found_fast_and_slowly_alike(
    name: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LAYOUTS[name]
    dtype = data.draw(st.sampled_from(case.kind.dtypes))
    sizes = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 70))
    packed: Any = some(case, *sizes, data.draw(st.floats(0, 1)), dtype, data.draw(st.integers(0, 99)))[0]
    assert packed.content_faults() == []
    field = POSITIONS[packed.format]
    numbers = getattr(packed, field).clone()
    info = torch.iinfo(numbers.dtype)
    for _ in range(data.draw(st.integers(0, 2)) if numbers.numel() else 0):
        at = data.draw(st.integers(0, numbers.numel() - 1))
        near = data.draw(st.integers(-2, 2)) + int(numbers[at])
        numbers[at] = min(max(data.draw(st.sampled_from([near, info.max, info.min])), info.min), info.max)
    spoilt = replace(packed, **{field: numbers})
    fast = spoilt.content_faults()
    with monkeypatch.context() as patched:
        for module, function in FAST:
            patched.setattr(module, function, lambda *_: False)
        slow = spoilt.content_faults()
    assert fast == slow
