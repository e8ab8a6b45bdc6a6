"""Triton kernels compile ahead of time, without a GPU: in a child process, as interpreter and compiler exclude each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsec.formats.layout import Layout
from sparsec.kernels import gpu_compile
from sparsec.kernels.gpu_compile import main, specialisations

pytest.importorskip("triton")

MOST = 10
"""Instructions that the decode loop of warp CSR may take for a weight on sm_90, with 8 and with 16 bits a column."""


def compiled(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "sparsec.kernels.gpu_compile", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_decode_loop_of_warp_csr_is_short_and_nothing_spills(tmp_path: Path) -> None:
    ended = compiled("--arch", "90", "--layouts", "wcsr8,wcsr16", "--dtypes", "bf16,fp16", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    header, _, *rows = (line.strip("|").split("|") for line in ended.stdout.splitlines())
    table = [dict(zip(map(str.strip, header), map(str.strip, row), strict=True)) for row in rows]
    kernels = [row["kernel"] for row in table]
    assert set(kernels) == {"wcsr_kernel", "wcsr_expand_kernel"}
    one = [row for row in table if row["kernel"] == "wcsr_kernel" and ", M=1," in row["constants"]]
    assert {(row["layout"], row["type"]) for row in one} == {
        (w, t) for w in ("wcsr8", "wcsr16") for t in ("bf16", "fp16")
    }
    assert all(4 < float(row["instr./element"]) <= MOST for row in one)
    assert all(row["spilled"] == "0" and int(row["registers"]) > 0 for row in table)


@pytest.mark.slow
def test_the_decode_loop_of_quantised_bitmaps_is_short_and_nothing_spills(tmp_path: Path) -> None:
    ended = compiled("--layouts", "bitmap:int8,bitmap:int4g64,bitmap:int4mg64", "--dtypes", "bf16", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    header, _, *rows = (line.strip("|").split("|") for line in ended.stdout.splitlines())
    table = [dict(zip(map(str.strip, header), map(str.strip, row), strict=True)) for row in rows]
    most = {"bitmap:int8": 17, "bitmap:int4g64": 22, "bitmap:int4mg64": 25}
    for arch in ("80", "90"):
        one = {r["layout"]: float(r["instr./element"]) for r in table if r["sm"] == arch and " M=1," in r["constants"]}
        assert one.keys() == most.keys()
        assert all(4 < one[layout] <= bound for layout, bound in most.items()), one


@pytest.mark.slow
def test_sizes_of_one_and_odd_sizes_compile_as_a_launch_takes_them(tmp_path: Path) -> None:
    code = """
from sparsec.formats.layout import Layout
from sparsec.kernels.gpu_compile import compile_all, specialisations
names = ["wcsr8", "bitmap", "nm2:4", "bitmap:int4mg64"]
for shape in ((1, 8), (23, 20)):
    launches = list(specialisations(map(Layout.parse, names), ["bf16"], False, shape))
    found = list(compile_all(launches, 90))
    assert len(list(compile_all(launches * 2, 90))) == len(found), "no two with the same code"
    assert {c.layout for c in found} == set(names)
    # Once for a size of one, which is compiled in, and once for others.
    assert len({(c.name, c.constants) for c in found}) < len(found)
    print(len(found))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert all(int(count) > 10 for count in ended.stdout.split())


def test_every_layout_and_row_bucket_is_among_what_is_compiled() -> None:
    found = list(specialisations(Layout.checked(), ["bf16"], every_config=False))
    kernels = {(v.layout, v.launch.kernel.__name__) for v in found}
    assert {layout for layout, _ in kernels} == set(map(str, Layout.checked()))
    for layout, kernel in (
        ("bitmap", "bitmap_expand_kernel"),
        ("nm2:4", "nm_kernel"),
        ("bsr64x64", "bsr_kernel"),
    ):
        assert (layout, kernel) in kernels
    assert {kernel for layout, kernel in kernels if ":int" in layout} == {
        *("bitmap_int_kernel", "bitmap_int_expand_kernel", "add_up_kernel", "wcsr_int_kernel", "wcsr_int_expand_kernel")
    }
    rows = {v.launch.constants["M"] for v in found if v.layout == "wcsr16" and "M" in v.launch.constants}
    assert rows == {1, 4, 8}
    # All configurations are more than those that are used untuned.
    tried = list(specialisations([Layout.parse("wcsr16")], ["bf16"], every_config=True))
    assert len(tried) > len([v for v in found if v.layout == "wcsr16"])


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--layouts", "csr8"], "--layouts: csr8 has to be read from a row's first entry on"),
        (["--dtypes", "fp64"], "unknown type 'fp64'; known: bf16"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert said in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            main([])
        assert "puts the interpreter in the place of the compiler; unset it" in capsys.readouterr().err


def test_a_loop_is_found_between_its_label_and_the_branch_back() -> None:
    code = """
        /*0000*/ MOV R1, R2 ;
.L_x_1:
        /*0010*/ LDG R1 ;
.L_x_2:
        /*0020*/ FFMA R1 ;
        /*0030*/ FADD R1 ;
        /*0040*/ @P0 BRA `(.L_x_2) ;
        /*0050*/ @P0 BRA `(.L_x_1) ;
        /*0060*/ EXIT ;
.L_x_3:
        /*0070*/ BRA `(.L_x_3) ;
"""
    assert gpu_compile._largest_loop(code) == 3
    assert gpu_compile._largest_loop("") == 0
