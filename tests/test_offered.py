"""Formats and kernels that packages offer: found, run, named, and asked before sparsec's own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from project import ROOT

from sparsec import formats, kernels
from sparsec.cost.choice import Setting, sparse_candidates
from sparsec.errors import ArgumentError, FormatError, KernelError, OfferedError
from sparsec.formats.layout import Layout
from sparsec.formats.values import EXAMPLES
from sparsec.kernels import registry
from sparsec.testing import check_format, check_kernel

# What is added to the tables stays there: so these run in processes of their own, in which packages are pretended.
PRETENDED = """
import importlib.metadata, runpy, sys, warnings
from types import SimpleNamespace

import torch

asked = []

def offer(**groups):
    def entries(group):
        asked.append(group)
        found = groups.get(group.replace("sparsec.", ""), ())
        return [SimpleNamespace(name=n, value="package:" + n, load=lambda v=v: v()) for n, v in found]
    sys.modules["sparsec.offered"].entry_points = entries

import sparsec.offered

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(32, 48), torch.nn.Linear(32, 16)
    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], -1)
two, x = Two().eval(), torch.randn(5, 32)
"""
OTHERS = """
sys.modules["__main__"].__dict__["runs"] = runs = []
from sparsec.kernels import Kernel
from sparsec.kernels.reference import dense_product

def mine(x, packed, bias):
    runs.append(packed.describe())
    return dense_product(x, packed.unpack(), bias)

offer(kernels=[
    ("mine", lambda: Kernel("bitmap_mine", "bitmap", (torch.float32,), ("cpu",), mine, refuses=lambda p: "few" * (p.tokens < 3))),
    ("broken", lambda: 1 / 0),
    ("odd", lambda: int),
])
import sparsec
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    made = sparsec.compile(two, "magnitude(0.5),freeze,fuse,lower(bitmap)", example_inputs=x)
print([str(w.message) for w in said if "entry point" in str(w.message)])
expected = sparsec.compile(two, "magnitude(0.5),freeze", example_inputs=x)
with torch.no_grad():
    for call in (made, made.sparsec.graph.run, torch.compile(made, backend="sparsec")):
        for rows, ran in ((5, 2), (1, 0)):
            runs.clear()
            torch.testing.assert_close(call(x[:rows]), expected(x[:rows]), rtol=1e-4, atol=1e-5)
            assert runs == ["bitmap"] * ran, (call, rows, runs)
assert "bitmap_mine" not in repr(made.a), made.a  # which tells of one row
# One that is added when a model runs already serves it from then on.
from sparsec.inductor import FuseProducts
late = sparsec.compile(two, "magnitude(0.5),freeze,fuse,lower(csr)", example_inputs=x)
with torch.no_grad():
    late(x)
    key = FuseProducts().uuid()
    sparsec.kernels.add(Kernel("csr_mine", "csr", (torch.float32,), ("cpu",), mine))
    assert FuseProducts().uuid() != key, "a graph that was kept on disk would call another kernel"
    runs.clear()
    torch.testing.assert_close(late(x), expected(x), rtol=1e-4, atol=1e-5)
assert runs == ["csr16"] * 2 and "csr_mine" in repr(late.a), (runs, late.a)
print("right")
"""
FORMATS = """
flat = runpy.run_path(sys.argv[1])
offer(formats=[("flat", lambda: flat["Flat"]), ("again", lambda: flat["Flat"]), ("number", lambda: 3)],
      kernels=[("sums", lambda: flat["FLAT_SUMS"])])
import sparsec
from sparsec.formats.layout import Layout, spellings
assert not [group for group in asked if group == "sparsec.formats"], "nobody asked for a format yet"
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert str(Layout.parse("flat")) == "flat" and "flat" in spellings()
print([str(w.message) for w in said])
from sparsec.testing import check_format, check_kernel
check_format("flat", torch.randn(5, 7), torch.rand(5, 7) < 0.5)
check_kernel(flat["FLAT_SUMS"], "flat")
passes = "magnitude(0.5, scope='layer'),freeze,sparsity,flops,fuse,"
made = sparsec.compile(two, passes + "lower(flat)", example_inputs=x, verify="probe")
expected = sparsec.compile(two, passes + "lower(dense)", example_inputs=x)
with torch.no_grad():
    for call in (made, made.sparsec.graph.run, torch.compile(made, backend="sparsec")):
        torch.testing.assert_close(call(x), expected(x), rtol=1e-4, atol=1e-5)
    again = sparsec.compile(two, passes + "lower(flat)", example_inputs=x)
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again(x), made(x))
    half = made.to(torch.bfloat16)
    assert {row.kernel for row in half.sparsec.report().layers if row.packed} == {"flat_reference"}
    half(x.bfloat16())
sparsec.compile(two, passes + "lower(auto)", example_inputs=x)
print("right")
"""


def ran(script: str) -> str:
    command = [sys.executable, "-c", PRETENDED + script, ROOT / "examples" / "write_a_format.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("right\n")
    return done.stdout


def test_a_kernel_of_another_package_comes_first_wherever_a_product_is_called() -> None:
    said = ran(OTHERS)
    assert (
        "'broken' of group 'sparsec.kernels' (package:broken) does not load and is left out: ZeroDivisionError" in said
    )
    assert "'odd' of group 'sparsec.kernels' (package:odd) is no sparsec.kernels.Kernel and is left out" in said


def test_a_format_of_another_package_goes_through_compile_report_and_load() -> None:
    said = ran(FORMATS)
    assert "'number' of group 'sparsec.formats' (package:number) is left out: 3 is no format" in said


def test_what_cannot_be_added_is_refused() -> None:
    class Other(formats.CSR):
        pass

    class Loud(formats.CSR):
        format = "CSR"

    with pytest.raises(FormatError, match="the name 'csr' is taken by CSR"):
        formats.add(Other)
    with pytest.raises(FormatError, match="the format 'CSR' must be called by small letters"):
        formats.add(Loud)
    with pytest.raises(FormatError, match="is no format: it must be a subclass"):
        formats.add(formats.Packed)
    first = kernels.KERNELS[0]
    with pytest.raises(KernelError, match=f"the name '{first.name}' is taken"):
        kernels.add(first)
    with pytest.raises(ArgumentError, match="kernel must be a Kernel"):
        kernels.add(torch.nn.Linear)


def fails(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("boom")


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "candidates": ({"candidates": classmethod(fails)}, "candidates raised ZeroDivisionError: boom"),
    "candidates of another kind": ({"candidates": lambda mask, device: 7}, "candidates raised TypeError"),
    "candidates that are none": ({"candidates": lambda mask, device: ["x"]}, "strange has no parameters, got strangex"),
    "options": ({"options": lambda parameters: None}, "options must give a dict, got None"),
    "plan": ({"plan": classmethod(fails)}, "plan raised ZeroDivisionError: boom"),
    "plan of another kind": ({"plan": lambda mask, dtype: 7}, "plan must give a Plan, got 7"),
    "pack": ({"pack": classmethod(fails)}, "pack raised ZeroDivisionError: boom"),
    "pack of another format": ({"pack": formats.CSR.pack}, "pack must give a Strange, got CSR"),
    "its count": ({"nnz": property(fails)}, "what pack gave, when looked at, raised ZeroDivisionError: boom"),
    "its tensors": (
        {"tensor_names": ("values", "beads")},
        "what pack gave, when looked at, raised AttributeError: .*beads",
    ),
    "its shape": ({"shape": property(lambda self: (1, 8))}, "what pack gave, when looked at, raised ValueError: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_format_that_breaks_its_promises_is_named_and_stops_no_other(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: whatever it raised came through, from `lower(auto)` too."""
    members, message = BROKEN[name]
    bad = type("Strange", (formats.Bitmap,), {"format": "strange", "__module__": "package.strange", **members})
    monkeypatch.setitem(formats.FORMATS, "strange", bad)
    mask, setting = torch.rand(16, 8) < 0.5, Setting("bytes", 1)
    layouts, named = [], r"the format 'strange' \(package.strange.Strange\): " if "none" not in name else ""
    if name.startswith(("candidates", "plan", "options")):
        with pytest.warns(UserWarning, match=rf"{named}{message}.* considered"):
            layouts = [c.layout.format for c in sparse_candidates(mask, torch.float32, setting)]
    else:
        layouts = [c.layout.format for c in sparse_candidates(mask, torch.float32, setting)]
    assert {"csr", "bitmap"} <= set(layouts)
    if not name.startswith("candidates"):
        with pytest.raises(OfferedError, match=named + message):
            Layout("strange").planned(mask, torch.float32)[0].pack(torch.randn(16, 8), mask)


def mine(**options: Any) -> kernels.Kernel:
    given = {"format": "bitmap", "dtypes": (torch.float32,), "devices": ("cpu",), "run": lambda x, packed, bias: x}
    return kernels.Kernel("mine", **{**given, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"refuses": fails}, "its refuses raised ZeroDivisionError: boom"),
        ({"refuses": lambda problem: None}, "its refuses must give a str, got None"),
        ({"missing": fails}, "its missing raised ZeroDivisionError: boom"),
        ({"missing": lambda: "no"}, "its missing must give a list, got 'no'"),
    ],
)
def test_a_kernel_that_cannot_say_what_it_serves_serves_nothing(options: dict[str, Any], said: str) -> None:
    first = kernels.known()[0]
    problem = kernels.Problem("bitmap", 8, 8)
    with pytest.warns(UserWarning, match=f"the kernel 'mine' is left out: {said}"):
        found = kernels.select(problem, (mine(**options), *kernels.known()))
    assert found.format == "bitmap"
    assert found.name != "mine"
    with pytest.warns(UserWarning, match="mine"), pytest.raises(KernelError, match=f"mine: {said}"):
        kernels.select(problem, (mine(**options), first))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (fails, "raised ZeroDivisionError: boom"),
        (lambda x, packed, bias: None, r"must give torch.float32 \[2, 16\], got None"),
    ],
)
def test_a_kernel_that_breaks_in_a_call_is_named(run: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = mine(run=run)
    monkeypatch.setattr(registry, "others", lambda: (kernel,))
    registry._table.cache_clear()
    packed = formats.Bitmap.pack(torch.randn(16, 8), torch.rand(16, 8) < 0.5)
    with pytest.raises(OfferedError, match=f"the kernel 'mine' {said}"):
        registry.dispatch(torch.randn(2, 8), packed, None)
    monkeypatch.undo()
    registry._table.cache_clear()


@pytest.mark.parametrize(
    "options", [{"format": 3}, {"dtypes": None}, {"dtypes": ()}, {"devices": "cpu"}, {"run": None}]
)
def test_a_kernel_of_odd_parts_is_refused_where_it_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(KernelError, match=r"the kernel 'mine': .* must be"):
        mine(**options)


def test_a_format_without_what_every_format_has_is_refused() -> None:
    """Regression: KeyError or TypeError in whatever listed the formats next."""
    nameless = type("Nameless", (formats.Bitmap,), {"format": None, "calibrated": None})
    with pytest.raises(
        FormatError, match="Nameless is no format: format must be a str, got None; calibrated must be a Mapping"
    ):
        formats.add(nameless)


@pytest.mark.parametrize(
    "kernel", [k for k in kernels.KERNELS if k.devices != ("cuda",) and k.format != "dense"], ids=lambda k: k.name
)
def test_own_kernels_keep_what_others_are_held_to(kernel: kernels.Kernel) -> None:
    if kernel.available():
        pytest.skip(f"no native kernels: {kernel.available()[0]}")
    coded = kernel.format.removesuffix("_int")
    for parameters in formats.kinds()[kernel.format].parameters:
        for values in EXAMPLES if coded != kernel.format else ("",):
            if not (values == "int4mg64" and coded in ("csr", "bsr", "nm")):  # which store what is not kept
                check_kernel(kernel, Layout(coded, parameters, values))


def test_a_kernel_and_a_format_that_break_their_promises_are_found() -> None:
    first = kernels.KERNELS[0]
    off = replace(first, run=lambda x, packed, bias: first.run(x, packed, bias) * 1.01)
    with pytest.raises(AssertionError, match=f"{first.name}: torch.float32, 1 rows"):
        check_kernel(off, "csr16")
    with pytest.raises(AssertionError, match="refuses every product"):
        check_kernel(replace(first, refuses=lambda problem: "never"), "csr16")

    class Lossy(formats.Bitmap):
        def unpack(self) -> torch.Tensor:
            return super().unpack().abs()

    layout = Layout.parse("bitmap")
    weight, mask = -torch.ones(4, 8), torch.rand(4, 8) < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(formats.FORMATS, "bitmap", Lossy)
        with pytest.raises(AssertionError, match="other values came back"):
            check_format(layout, weight, mask)
