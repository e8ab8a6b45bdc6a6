"""The native library builds once, says why when it cannot, and every instruction set runs on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsec.errors import BuildError, KernelError
from sparsec.kernels import build
from sparsec.kernels.library import loader, toolchain

CHECKOUT = Path(__file__).parent.parent
HAS_COMPILER = any(shutil.which(name) for name in toolchain.CANDIDATES)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
VARIABLES = ("CXX", "SPARSEC_ISA", "SPARSEC_NATIVE", "SPARSEC_NATIVE_LIBRARY")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """As in a new process with an empty cache; the state from before comes back."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "library_name", lambda: "libtest.so")  # one in the package is not seen
    loader._load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    loader._load.cache_clear()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process with its own environment."""
    base = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=base | environment, check=False
    )


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


PRODUCT = """
import torch
from sparsec.formats import CSR
import sparsec.kernels as k
from sparsec.kernels.library import loader
assert not loader.was_asked(), "importing must not build"
m = k.SparseLinear(CSR.pack(torch.eye(3), torch.eye(3, dtype=torch.bool)))
x = torch.arange(3.0)
with torch.no_grad():
    assert torch.equal(m(x), x) and torch.equal(m(x), x)
print(k.status().built, "csr_reference" in repr(m))
"""


def test_without_a_compiler_everything_works_with_one_notice(tmp_path: Path) -> None:
    if (toolchain.SOURCES / toolchain.library_name()).exists():
        pytest.skip("a library was built into the package; no compiler is needed")
    done = python(PRODUCT, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
    assert done.stderr.count("RuntimeWarning") == 1
    assert "none of c++, g++, clang++ found; install a C++17 compiler" in done.stderr


@pytest.mark.parametrize("switch", [{"SPARSEC_NATIVE": "0"}, {"SPARSEC_ISA": "reference"}], ids=str)
def test_turned_off_means_reference_kernels_without_a_notice(switch: dict[str, str]) -> None:
    done = python(PRODUCT, **switch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
    assert "Warning" not in done.stderr


def test_a_compiler_that_is_not_there_is_named(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match=r"'no-such-compiler', named in CXX .* was not found"):
        status = loader.status()
    assert not status.built
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.status() == status  # and is said once
    with pytest.raises(KernelError, match="no-such-compiler"):
        loader.force_isa("portable")


def test_a_broken_compiler_is_quoted(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = (
        'case "$*" in *--version*) echo fake 1;; *-dumpmachine*) echo x86_64-linux;; *) echo boom >&2; exit 3;; esac'
    )
    fresh.setenv("CXX", script(tmp_path / "broken", broken))
    with pytest.warns(RuntimeWarning, match=r"exit status 3(.|\n)*boom(.|\n)*SPARSEC_NATIVE=0"):
        assert not loader.status().built


def test_a_damaged_library_is_named(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "damaged.so"
    path.write_text("not a library")
    fresh.setenv("SPARSEC_NATIVE_LIBRARY", str(path))
    with pytest.warns(RuntimeWarning, match=r"damaged\.so cannot be loaded"):
        assert not loader.status().built


@needs_compiler
def test_a_foreign_library_is_named(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It loads, and used to end in an AttributeError about an undefined symbol."""
    source, path = tmp_path / "foreign.cpp", tmp_path / "foreign.so"
    source.write_text('extern "C" int sparsec_isa(int) { return 0; }')
    subprocess.run([*toolchain.find_compiler().command, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    fresh.setenv("SPARSEC_NATIVE_LIBRARY", str(path))
    message = (
        r"foreign\.so is no library of .* lacks sparsec_cpu_has, .*; build one with .*unset SPARSEC_NATIVE_LIBRARY"
    )
    with pytest.warns(RuntimeWarning, match=message):
        assert not loader.status().built
    with pytest.raises(BuildError, match=message):
        loader.Library(path, None)


WORKS = 'case "$1" in --version) echo works 1;; -dumpmachine) echo x86_64-linux;; esac'


def test_a_compiler_that_fails_makes_way_for_the_next(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(tmp_path / "c++", "echo no tools installed >&2; exit 1")
    fresh.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"none of c\+\+, g\+\+, clang\+\+ works:\nc\+\+: (.|\n)*no tools installed"):
        toolchain.find_compiler()
    script(tmp_path / "clang++", WORKS)
    assert toolchain.find_compiler().command == ("clang++",)


def test_a_compiler_that_was_named_does_not_make_way(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(tmp_path / "clang++", WORKS)
    script(tmp_path / "mine", "echo broken >&2; exit 1")
    fresh.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="broken"):
        toolchain.find_compiler("mine")
    fresh.setenv("CXX", "mine")
    with pytest.raises(BuildError, match="broken"):
        toolchain.find_compiler()


def test_an_unknown_instruction_set_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("SPARSEC_ISA", "sse9")
    with pytest.raises(
        KernelError, match="one of amx, avx512_bf16, vbmi2, avx512, avx2, portable, reference, got 'sse9'"
    ):
        loader.status()


@needs_compiler
def test_a_forced_instruction_set_is_used_or_refused() -> None:
    usable = loader.library().usable
    for name in ("amx", "avx512_bf16", "vbmi2", "avx512", "avx2", "portable"):
        if name in usable:
            loader.force_isa(name)
            assert loader.status().isa == name
        else:
            with pytest.raises(KernelError, match=f"'{name}' cannot be used here: .* have {', '.join(usable)}"):
                loader.force_isa(name)
    loader.force_isa(None)
    first = python("import sparsec.kernels as k; print(k.status().isa)", SPARSEC_ISA="").stdout.strip()
    assert loader.status().isa == first
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
    best = [name for name in usable if not (intel and name == "avx512_bf16")]  # whose products of pairs are slow there
    assert first == best[0]


@needs_compiler
def test_the_environment_forces_an_instruction_set() -> None:
    done = python("import sparsec.kernels as k; print(k.status().isa)", SPARSEC_ISA="portable")
    assert done.stdout.strip() == "portable", done.stderr


@needs_compiler
def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    if (toolchain.SOURCES / toolchain.library_name()).exists():
        pytest.skip("a library was built into the package; nothing is built at first use")
    real = loader.library().path
    log = tmp_path / "log"
    # A compiler that takes a second and links the library which is already there.
    fake = f"""echo "$*" >> {log}
while [ $# -gt 0 ]; do case "$1" in
  --version) echo fake 1; exit;; -dumpmachine) echo x86_64-linux; exit;;
  -shared) link=1;; -o) shift; out=$1;;
esac; shift; done
if [ -n "$link" ]; then sleep 1; cp {real} "$out"; else : > "$out"; fi
"""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment |= {"CXX": script(tmp_path / "fake", fake), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "import sparsec.kernels as k; assert k.status().built; print(k.status().path)"]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1
    assert log.read_text().count("-shared") == 1


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="needs Linux and nm")
def test_a_compiler_that_takes_in_the_cpp_library_keeps_it_within(tmp_path: Path) -> None:
    """Regression: half of a libstdc++ taken in was bound to the process's own, and every refusal was a segmentation fault."""
    source, library = tmp_path / "refuses.cpp", tmp_path / "refuses.so"
    source.write_text(
        '#include <sstream>\nextern "C" int refuse(long n) { std::ostringstream s; s << n; return s.str().size(); }\n'
    )
    command = [
        *toolchain.find_compiler().command,
        "-fPIC",
        "-shared",
        "-static-libstdc++",
        str(source),
        "-o",
        str(library),
    ]

    def exported(*flags: str) -> set[str]:
        subprocess.run([*command, *flags], check=True)
        listed = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True)
        return {line.split()[-1] for line in listed.stdout.splitlines()}

    number = "_ZNSolsEl"  # std::ostream::operator<<(long)
    if number not in exported():
        pytest.skip("this compiler has no libstdc++ to take in")
    found = exported(*toolchain._link_flags(toolchain.find_compiler().machine))
    assert "refuse" in found
    assert number not in found


def test_the_key_changes_with_whatever_makes_a_library_stale(fresh: pytest.MonkeyPatch) -> None:
    chain = toolchain.Toolchain(("g++",), "g++ 12", "x86_64-linux-gnu")
    keys = [
        chain.key(),
        toolchain.Toolchain(("g++",), "g++ 13", "x86_64-linux-gnu").key(),
        toolchain.Toolchain(("g++",), "g++ 12", "x86_64-linux-gnu", portable=True).key(),
    ]
    fresh.setattr(torch, "__version__", "0.0")
    keys.append(chain.key())
    fresh.setattr(toolchain, "source_key", lambda: "other sources")
    keys.append(chain.key())
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
@needs_compiler
def test_avx512_is_right_through_simde(tmp_path: Path) -> None:
    """Builds the AVX-512 source with emulated intrinsics and tiles, and runs the whole product test on it."""
    header = next((p for p in ("/usr/include", "/usr/local/include") if Path(p, "simde/x86/avx512.h").exists()), None)
    if header is None:
        pytest.skip("needs SIMDe's headers (Debian: libsimde-dev)")
    if "avx2" not in loader.library().usable:
        pytest.skip("needs a CPU with AVX2")
    toolchain.find_compiler(simde=True).build(tmp_path / "emulated.so")
    # -P: the checkout must not be importable, or its `kernels` folder would be found under that name.
    command = [sys.executable, "-P", "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    products, digits = (CHECKOUT / "tests" / f"test_{name}.py" for name in ("kernels_products", "digits"))
    command += [
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "-k",
        "avx512 or amx or vbmi2 or test_digits",
        str(products),
        str(digits),
    ]
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment["SPARSEC_NATIVE_LIBRARY"] = str(tmp_path / "emulated.so")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CHECKOUT, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_a_cross_compiler_accepts_the_portable_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    compiler = "aarch64-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler} (Debian: g++-aarch64-linux-gnu)")
    assert build.main(["--check", "--portable", "--compiler", compiler]) == 0
    assert "aarch64-linux-gnu accepts library.cpp, isa_portable.cpp" in capsys.readouterr().out
    assert set(toolchain.find_compiler(compiler).files) == {"library.cpp", "isa_portable.cpp"}


@needs_compiler
def test_no_portable_source_includes_an_x86_header() -> None:
    """Looked for in what the compiler reads, headers and all, and with the instruction sets that CXX might turn on."""
    chain = toolchain.find_compiler()
    on = ["-mf16c", "-mavx2"] if chain.machine.startswith("x86_64") else []
    command = [*chain.command, "-std=c++17", "-E", *on]
    read = {
        name: subprocess.run(
            [*command, str(toolchain.SOURCES / name)], capture_output=True, text=True, check=True
        ).stdout
        for name in ("isa_portable.cpp", "isa_avx2.cpp")[: 1 + bool(on)]
    }
    assert "convert.h" in read["isa_portable.cpp"]
    assert "immintrin" not in read["isa_portable.cpp"]
    if on:
        assert "immintrin" in read["isa_avx2.cpp"]  # the test would see it
    assert "immintrin" not in (toolchain.SOURCES / "library.cpp").read_text()


def test_the_command_reports_a_failure_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = script(tmp_path / "broken", 'case "$*" in *--version*|*-dumpmachine*) echo x;; *) exit 1;; esac')
    assert build.main(["--compiler", broken, "--output", str(tmp_path / "out")]) == 1
    assert "error: the compiler failed" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(BuildError):
        toolchain.find_compiler(broken).check()
