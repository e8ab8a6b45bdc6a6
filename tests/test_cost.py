"""The cost model: what it predicts, how its constants are fitted, and which files it believes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsec.cost import __main__ as cli
from sparsec.cost import constants as cal
from sparsec.cost.constants import Constants, Found, Key, from_json, load_file, save_file, to_json
from sparsec.cost.fit import Timed, fit, non_negative
from sparsec.cost.model import KernelCost, Rate, ReadRate, RowsRate, Work
from sparsec.errors import ConstantsError
from sparsec.formats import CSR
from sparsec.kernels import status

FIXTURE = Path(__file__).parent / "calibration.json"


seconds = st.floats(0, 1e-3) | st.just(0.0)
rates = st.builds(Rate, st.floats(0, 1e-8), st.floats(0, 1e-8))
row_rates = st.lists(st.builds(RowsRate, st.integers(2, 600), rates), max_size=4, unique_by=lambda r: r.rows).map(
    lambda found: tuple(sorted(found, key=lambda r: r.rows))
)
costs = st.builds(
    KernelCost,
    st.just("csr_cpu"),
    st.just("csr16"),
    st.just("float32"),
    seconds,
    seconds,
    st.floats(0, 1e-8),
    rates,
    row_rates,
    seconds,
)
works = st.builds(Work, st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 10**7), st.integers(0, 10**8))
some_constants = st.builds(
    Constants,
    st.builds(
        Key, st.text(max_size=8), st.text(max_size=8), st.integers(1, 99), st.text(max_size=8), st.text(max_size=8)
    ),
    st.floats(0, 10),
    st.lists(st.builds(ReadRate, st.integers(1, 10**9), st.floats(1e-12, 1e-9)), max_size=3).map(tuple),
    st.floats(0, 1e-3),
    st.lists(costs, max_size=3).map(tuple),
)


@given(cost=costs, work=works, more=st.integers(0, 10**7), rows=st.integers(1, 2000))
def test_more_bytes_or_values_or_rows_never_take_less(cost: KernelCost, work: Work, more: int, rows: int) -> None:
    slack = 1 + 1e-9  # powers and logarithms round
    for larger in (replace(work, nbytes=work.nbytes + more), replace(work, stored=work.stored + more)):
        assert cost.predict(larger, rows).seconds * slack >= cost.predict(work, rows).seconds
    assert cost.predict(work, rows, reach=2.0).seconds <= cost.predict(work, rows).seconds * slack


def test_the_time_is_the_call_and_the_highest_roof() -> None:
    cost = KernelCost(
        "k", "csr16", "float32", 10e-6, 0.0, 1e-10, Rate(2e-10, 0.0), (RowsRate(8, Rate(1e-9, 0.0)),), 0.0
    )
    reading, decoding = Work(100, 100, 10_000, 10**6), Work(100, 100, 10**6, 10**6)
    assert cost.predict(reading).seconds == pytest.approx(110e-6)
    assert cost.predict(reading).binds == "bytes"
    assert cost.predict(decoding).seconds == pytest.approx(210e-6)
    assert cost.predict(decoding).binds == "decode"
    assert cost.predict(decoding, rows=8).seconds == pytest.approx(1010e-6)
    assert cost.predict(decoding, rows=8).binds == "flops"
    assert cost.predict(decoding, rows=64).seconds == pytest.approx(8010e-6), "beyond the last measurement: by the row"
    assert cost.predict(Work(1, 1, 1, 8)).binds == "call"
    between = cost.predict(decoding, rows=3).multiply
    assert between == pytest.approx(200e-6 * 5 ** (math.log(3) / math.log(8))), "a straight line in log-log"


def test_a_working_set_that_a_cache_holds_is_read_at_the_speed_of_that_cache() -> None:
    known = load_file(FIXTURE)
    assert known.reach(None) == known.reach(1 << 40) == 1.0
    assert known.reach(1 << 18) == pytest.approx(60 / 28)
    assert known.reach((1 << 24) + 1) == pytest.approx(30 / 28)


@settings(max_examples=15)
@given(
    call=st.floats(5e-6, 5e-5),
    per_output=st.floats(0, 5e-8),
    gigabytes=st.floats(5, 30),
    per_stored=st.floats(1e-11, 1e-9),
    per_position=st.floats(1e-12, 1e-10),
)
def test_fit_finds_the_constants_that_made_the_times(
    call: float, per_output: float, gigabytes: float, per_stored: float, per_position: float
) -> None:
    truth = KernelCost(
        "k", "csr16", "float32", call, per_output, 1e-9 / gigabytes, Rate(per_stored, per_position), (), 0.0
    )
    shapes = [(192, 576), (576, 576), (576, 1536), (2048, 768), (2048, 2048)]
    samples = []
    for o, i in shapes:
        for density in (0.5, 0.3, 0.1):
            nnz = int(o * i * density)
            work = Work(o, i, nnz, 6 * nnz)
            samples.append(Timed(work, 1, truth.predict(work).seconds))
            samples.append(Timed(work, 1, 5e-6 + truth.decode.seconds(work), warm=True))
            samples.append(Timed(work, 8, call + per_output * o + 4 * per_stored * nnz))
    found = fit("k", "csr16", "float32", samples, 1e-9 / 30)
    cold = [s for s in samples if not s.warm]
    # Where two roofs lie close to each other, the choice between them is free; the times are not.
    wrong = [s for s in cold if s.rows == 1 and abs(found.predict(s.work).seconds / s.seconds - 1) > 0.15]
    assert len(wrong) <= 1
    eight = [s for s in cold if s.rows == 8]
    below = [s for s in eight if found.predict(s.work, 8).seconds < 0.9 * s.seconds]
    assert not below


def test_fit_is_not_led_astray_by_disturbed_measurements() -> None:
    truth = KernelCost("k", "dense", "float32", 20e-6, 3e-8, 4e-11, Rate(0.0, 0.0), (), 0.0)
    samples = [Timed(w, 1, 5e-6, warm=True) for w in (Work(64, 64, 4096, 16384), Work(128, 64, 8192, 32768))]
    for i, (o, k) in enumerate(
        [(192, 576), (576, 576), (576, 1536), (1536, 576), (2048, 768), (2048, 2048), (768, 768)]
    ):
        work = Work.dense(o, k, torch.float32)
        samples.append(Timed(work, 1, truth.predict(work).seconds * (20.0 if i == 2 else 1.0)))
    found = fit("k", "dense", "float32", samples, 4e-11)
    for sample in samples:
        if not sample.warm and sample.work.in_features != 1536:
            assert found.predict(sample.work).seconds == pytest.approx(sample.seconds, rel=0.1)


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=3, max_size=6), st.data())
def test_non_negative_least_squares_is_no_worse_than_any_other_point(
    rows: list[list[float]], data: st.DataObject
) -> None:
    a = torch.tensor(rows, dtype=torch.float64).numpy()
    b = torch.tensor(
        data.draw(st.lists(st.floats(-5, 5), min_size=len(rows), max_size=len(rows))), dtype=torch.float64
    ).numpy()
    x = non_negative(a, b)
    assert (x >= 0).all()
    other = torch.tensor(data.draw(st.lists(st.floats(0, 3), min_size=3, max_size=3)), dtype=torch.float64).numpy()
    assert ((a @ x - b) ** 2).sum() <= ((a @ other - b) ** 2).sum() + 1e-6


@given(some_constants)
def test_json_reads_back_as_the_same_constants(found: Constants) -> None:
    assert from_json(to_json(found)) == found


@given(at=st.integers(0, len(FIXTURE.read_bytes()) - 1), byte=st.integers(0, 255))
def test_a_file_with_any_byte_changed_is_refused_or_says_the_same(at: int, byte: int) -> None:
    data = bytearray(FIXTURE.read_bytes())
    assume(data[at] != byte)
    data[at] = byte
    try:
        found = from_json(data.decode())
    except (ConstantsError, UnicodeDecodeError):
        return
    assert found == load_file(FIXTURE), "a change in white space only"


@given(
    st.one_of(
        st.text(max_size=30),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=3),
            lambda c: st.dictionaries(st.text(max_size=6), c, max_size=3) | st.lists(c, max_size=3),
        ).map(json.dumps),
    )
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ConstantsError):
        from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(load=-1.0), "expected a number of at least 0, got -1.0"),
        (lambda c: c.update(load=True), "expected a number of at least 0, got True"),
        (lambda c: c["kernels"][0].update(call=None), "expected a number of at least 0, got None"),
        (lambda c: c["kernels"][0].pop("decode"), "KeyError: 'decode'"),
        (lambda c: c["key"].pop("isa"), "TypeError"),
        (
            lambda c: c.update(schema="sparsec.cost/0"),
            "holds no constants of this version ('sparsec.cost/3'): 'sparsec.cost/0'",
        ),
    ],
)
def test_a_wrong_content_is_refused_even_with_a_right_checksum(change, message: str) -> None:
    content = json.loads(FIXTURE.read_text())
    del content["sha256"]
    change(content)
    content["sha256"] = cal._checksum(content)
    with pytest.raises(ConstantsError) as caught:
        from_json(json.dumps(content))
    assert message in str(caught.value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Key:
    """A cache folder of its own, and a measurement that only counts its calls."""
    status()  # before: it builds the native kernels where there are none
    monkeypatch.delenv(cal.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cal, "measure_machine", fake_measure)
    monkeypatch.setattr(cal, "load_average", lambda: 0.0)
    fake_measure.calls.clear()
    return Key.here()


def fake_measure(key: Key, dtypes: list[torch.dtype], progress: object = None) -> Constants:
    fake_measure.calls.append(tuple(dtypes))
    known = load_file(FIXTURE)
    names = {str(d).removeprefix("torch.") for d in dtypes}
    return replace(known, key=key, load=fake_measure.load, kernels=tuple(k for k in known.kernels if k.dtype in names))


fake_measure.calls = []  # type: ignore[attr-defined]
fake_measure.load = 0.0  # type: ignore[attr-defined]


def ask(*dtypes: torch.dtype, **options: bool) -> Found:
    found = cal.machine_constants(list(dtypes or (torch.float32,)), **options)
    assert found is not None
    return found


def test_a_machine_is_measured_once_and_a_dtype_when_it_is_first_asked_for(here: Key) -> None:
    assert cal.machine_constants([torch.float32], measuring=False) is None
    first = ask()
    assert first.source == "measured now"
    assert ask() == replace(first, source=str(here.file()))
    both = ask(torch.float32, torch.bfloat16)
    assert fake_measure.calls == [(torch.float32,), (torch.bfloat16,)]
    assert both.constants.dtypes == {"float32", "bfloat16"}
    assert ask(torch.bfloat16, measuring=False).constants == both.constants
    ask(force=True)
    assert len(fake_measure.calls) == 3


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_damaged_file_is_said_to_be_so_and_measured_anew(here: Key, damage: bytes) -> None:
    ask()
    here.file().write_bytes(damage)
    found = ask()
    assert found.source == "measured now"
    assert str(here.file()) in found.notices[0]
    assert found.notices[0].endswith("it is measured anew")
    assert ask().notices == ()


def test_a_file_of_another_machine_is_not_believed(here: Key) -> None:
    save_file(replace(load_file(FIXTURE)), here.file())
    found = ask()
    assert "was measured elsewhere" in found.notices[0]
    assert found.constants.key == here


def test_what_was_measured_on_a_busy_machine_is_said_and_measured_anew_once_it_is_idle(
    here: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_measure, "load", 99.0)
    monkeypatch.setattr(cal, "load_average", lambda: 99.0)
    assert "was busy when it was measured (load 99.0" in ask().notices[0]
    assert "was busy" in ask().notices[0]
    assert len(fake_measure.calls) == 1
    monkeypatch.setattr(cal, "load_average", lambda: 0.0)
    monkeypatch.setattr(fake_measure, "load", 0.0)
    assert ask().notices == ()
    assert len(fake_measure.calls) == 2


def test_a_dtype_that_is_measured_on_a_busy_machine_leaves_alone_how_memory_is_read(
    here: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the rates of a busy moment took the place of good ones, for all dtypes."""
    calm = ask().constants

    def disturbed(key: Key, dtypes: list[torch.dtype], progress: object = None) -> Constants:
        found = fake_measure(key, dtypes)
        return replace(found, load=99.0, member=1.0, reads=tuple(replace(r, per_byte=1.0) for r in found.reads))

    monkeypatch.setattr(cal, "measure_machine", disturbed)
    both = ask(torch.float32, torch.bfloat16).constants
    assert both.dtypes == {"float32", "bfloat16"}
    assert (both.reads, both.member, both.load) == (calm.reads, calm.member, 99.0)


def test_a_folder_that_cannot_be_written_is_a_notice(here: Key, tmp_path: Path) -> None:
    (tmp_path / "sparsec").write_text("a file where the folder should be")
    found = ask()
    assert "cannot be kept" in found.notices[0]
    assert found.constants.dtypes == {"float32"}


def test_more_threads_than_cores_are_a_notice(here: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cal, "cores", lambda: 1)
    key = replace(here, threads=5)
    known = replace(load_file(FIXTURE), key=key)
    assert any("5 threads share 1 cores" in note for note in cal.remarks(known))
    assert not any("threads" in note for note in cal.remarks(replace(known, key=replace(key, threads=1))))


def test_a_named_file_is_taken_as_it_is_or_refused(here: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cal.VARIABLE, str(FIXTURE))
    found = ask()
    assert found.constants == load_file(FIXTURE)
    assert "was measured elsewhere (processor A Processor, here" in found.notices[-1]
    bad = tmp_path / "bad.json"
    bad.write_text(FIXTURE.read_text()[:-100])
    for path, why in ((bad, "is damaged"), (tmp_path / "none.json", "cannot be read")):
        monkeypatch.setenv(cal.VARIABLE, str(path))
        with pytest.raises(ConstantsError, match=why) as caught:
            ask()
        assert str(caught.value).startswith(f"SPARSEC_CALIBRATION={path}: ")
        assert "unset SPARSEC_CALIBRATION" in str(caught.value)
    assert fake_measure.calls == []


def test_work_of_a_packed_matrix_counts_what_it_holds() -> None:
    mask = torch.zeros(2, 600, dtype=torch.bool)
    mask[0, [0, 599]] = True
    packed = CSR.pack(torch.ones(2, 600), mask, index_bits=8)
    assert Work.of(packed) == Work(2, 600, packed.values.numel(), packed.nbytes)
    assert Work.of(packed).stored > packed.nnz, "fillers are multiplied too"


def test_command_line_shows_writes_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mine.json"
    assert cli.main(["--show", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "A Processor" in shown
    assert "bitmap_cpu" in shown
    assert load_file(out) == load_file(FIXTURE)
    threads = torch.get_num_threads()
    try:
        assert cli.main(["--threads", "1", "--show"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    for arguments, message in ((["--dtypes", "fp64"], "--dtypes takes"), (["--threads", "0"], "at least 1, got 0")):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.delenv(cal.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["--show"]) == 2
    assert "nothing is known of fp32, bf16, fp16 on this machine with" in capsys.readouterr().err
    monkeypatch.setattr(cal, "measure_machine", fake_measure)
    ask(torch.bfloat16)
    assert cli.main(["--show"]) == 0  # regression: refused where not all dtypes were known
    assert "not measured yet: fp32, fp16" in capsys.readouterr().out
