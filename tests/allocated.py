"""How much memory torch takes while something runs."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_allocation(function: Callable[[], object]) -> int:
    """Peak of torch's CPU allocations while the function runs, in bytes, beside what was there before. It must return something."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert events
    assert result
    return peak
