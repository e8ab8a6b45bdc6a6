"""How much memory torch takes while something runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def peak_allocation(function: Callable[[], object]) -> int:
    """Peak of torch's CPU allocations while the function runs, in bytes, beside what was there before. It must return something.

    torch forgets no size that an earlier profile saw: when memory at the same place is freed, it tells of that size, whatever was
    there by then. So only what was allocated here counts as freed; else the peak would depend on what ran before in the process.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    own: dict[int, int] = {}  # by address
    held = peak = 0
    events = sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree()), key=lambda e: e[0])
    for _, place, nbytes in events:
        if nbytes > 0:
            own[place] = nbytes
            held += nbytes
        else:
            held -= own.pop(place, 0)
        peak = max(peak, held)
    assert events
    assert result
    return peak


def _allocations(events: list[Any]) -> Iterator[tuple[int, int, int]]:
    """When, where, and how many bytes; less than 0 where they are freed."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)
