"""How far a command is: lines of one form in a pipe, bars on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sparsec.console.progress import Pace, StageLines, shown_progress
from sparsec.errors import DataError
from sparsec.progress import stage


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_stages_are_lines_in_a_pipe() -> None:
    """What runs, how far a long one is, how long it took; one within another is set in."""
    now, pipe = [0.0], io.StringIO()
    lines = StageLines(pipe, lambda: now[0])
    for at, what, done, total in [
        (0, "loading", 0, 1), (2, "loading", 1, 1), (2, "pass 1 wanda", 0, 1), (3, "reading", 0, 9), (13, "reading", 4, 9),
        (33, "reading", 8, 9), (34, "reading", 9, 9), (35, "pass 1 wanda", 1, 1), (40, "again", 0, 1),
    ]:  # fmt: skip
        now[0] = float(at)
        lines(what, done, total)
    lines.close()
    assert pipe.getvalue().splitlines() == [
        "loading ... 2.0 s",
        "pass 1 wanda ...",
        "  reading ... 8 of 9, 30.0 s, about 4 s left",
        "    31.0 s in all",
        "  33.0 s in all",
        "again ...",
    ]


def test_a_stage_that_its_outer_one_ends_says_its_time() -> None:
    """Regression: of what had no last step, lower among others, the line stayed without a time."""
    now, pipe = [0.0], io.StringIO()
    lines = StageLines(pipe, lambda: now[0])
    for at, what, done in [(0, "pass 1 lower", 0), (1, "lower", 0), (8, "lower", 1), (11, "pass 1 lower", 2)]:
        now[0] = float(at)
        lines(what, done, 2)
    assert pipe.getvalue().splitlines() == ["pass 1 lower ...", "  lower ... 10.0 s", "  11.0 s in all"]


STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.sampled_from([0.0, 2.0, 30.0])), max_size=20)


@given(STEPS)
def test_every_line_of_a_pipe_has_one_form(steps: list[tuple[str, int, float]]) -> None:
    """And once the outermost stage is over, every stage that said anything has said its time, once, and its name once but for how
    far it is."""
    now, pipe = [0.0], io.StringIO()
    lines = StageLines(pipe, lambda: now[0])
    for what, done, seconds in [("all", 0, 0.0), *steps, ("all", 2, 1.0)]:
        now[0] += seconds
        lines(what, done, 2)
    form = re.compile(
        r"(?P<in> *)(?:(?P<name>\w+) \.\.\.(?: (?P<far>\d of 2, )?(?P<time>\d+\.\d s)"
        r"(?(far), about (?:\d\.\d min|\d+ (?:s|min)) left|)?)?"
        r"|(?P<whole>\d+\.\d s in all))"
    )
    found = [form.fullmatch(line) for line in pipe.getvalue().splitlines()]
    assert all(found)
    open_at: dict[int, str] = {}  # the stages whose time is still to come, by how far they are set in
    for line in found:
        assert line is not None
        depth = len(line["in"]) - 2 * bool(line["whole"])
        if line["whole"]:
            open_at.pop(depth)
        elif line["far"] or not line["time"]:
            assert open_at.setdefault(depth, line["name"]) == line["name"]
        else:
            assert depth not in open_at  # its name would stand there twice
    assert not open_at


def test_a_stage_takes_short_and_unfinished_ones_within_it_along() -> None:
    """Regression: what a pass began and never ended stood open, and all that came after was set in."""
    pipe = io.StringIO()
    lines = StageLines(pipe, lambda: 0.0)
    for what, done in [
        ("pass 1 freeze", 0),
        ("freeze", 0),
        ("pass 1 freeze", 1),
        ("pass 2 lower", 0),
        ("pass 2 lower", 1),
    ]:
        lines(what, done, 1)
    assert pipe.getvalue().splitlines() == ["pass 1 freeze ... 0.0 s", "pass 2 lower ... 0.0 s"]


def test_a_stage_that_fails_ends_its_line() -> None:
    pipe = io.StringIO()
    with pytest.raises(DataError), shown_progress(pipe) as show, stage(show, "loading"):
        raise DataError("no")
    assert pipe.getvalue() == "loading ...\n"


def test_a_terminal_shows_a_bar_and_keeps_a_line_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with shown_progress(terminal) as show:
        show("packing [a]", 1, 2)
        show("packing [a]", 2, 2)
        show("packing [a]", 0, 2)
    assert re.search(r"packing \[a\] \.\.\. \d+\.\d s", terminal.getvalue())


@example(first=0, steps=[30.0], more=3)
@given(first=st.integers(0, 3), steps=st.lists(st.floats(0.5, 5000), min_size=1, max_size=9), more=st.integers(1, 9))
def test_the_time_left_is_told_from_the_steps_so_far(first: int, steps: list[float], more: int) -> None:
    """Steps that were taken over count for nothing, and while a step takes its time, less is left."""
    total, now = first + len(steps) + more, 100.0
    pace = Pace.start(now, first, total)
    assert pace.left(now + 7) == ""
    for done, seconds in enumerate(steps, first + 1):
        now += seconds
        pace.step(now, done, total)
    expected = sum(steps) / len(steps) * more

    def seconds_in(text: str) -> float:
        found = re.fullmatch(r"about ([\d.]+) (s|min|h) left", text)
        assert found is not None
        return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]]

    assert seconds_in(pace.left(now)) == pytest.approx(expected, rel=0.05, abs=0.51)
    assert seconds_in(pace.left(now + expected / 2)) == pytest.approx(expected / 2, rel=0.05, abs=0.51)
    assert seconds_in(pace.left(now + 2 * expected)) == 0
    pace.step(now, first + len(steps), total + more)  # a search that learns it has to look further
    assert seconds_in(pace.left(now)) == pytest.approx(2 * expected, rel=0.05, abs=0.51)
    pace.step(now, total, total)
    assert pace.left(now) == ""


def test_a_terminal_says_how_long_a_stage_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    with shown_progress(terminal) as show:
        show("cells", 0, 4)
        show("cells", 1, 4)
    assert re.search(r"about \d+ s left", terminal.getvalue())
