"""Memory that a call takes."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile


def peak(work) -> int:
    """The most bytes that live at once beyond what lived before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
