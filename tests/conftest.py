"""Settings of all tests: how many random examples, and nobody's own folders on the import path under the wrong name."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# The default draws the same examples on every machine and in every run, so that a red test is red for everybody.
# No deadline: the first call of a kernel may compile it.
_SLOW_FIXTURES = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "default", derandomize=True, max_examples=50, deadline=None, suppress_health_check=_SLOW_FIXTURES
)
settings.register_profile(
    "thorough", max_examples=500, deadline=None, print_blob=True, suppress_health_check=_SLOW_FIXTURES
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Whole texts that tests compare with are written anew on request only."""
    parser.addoption("--slow", action="store_true", help="also the tests that take more than 15 seconds")
    parser.addoption("--trace-anew", action="store_true", help="trace every model anew, as users do; slower")
    parser.addoption("--refresh-goldens", action="store_true", help="write tests/golden anew instead of comparing")


_LONG = (
    *("test_real_model.py", "test_native_build.py", "test_tracer.py", "test_gpu_kernels.py", "test_calibrate.py"),
    *("test_compile.py", "test_bench_gpu.py", "test_chains.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes go first, so that at the end no worker waits for the other; the slowest tests are asked for."""
    if not items or not items[0].config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(
                    pytest.mark.skip(reason="takes more than 15 seconds; pytest --slow runs it, as .ci/run does")
                )
    items.sort(key=lambda item: item.path.name not in _LONG)


def pytest_configure(config: pytest.Config) -> None:
    """Several workers share the cores; and the checkout must not be on the import path."""
    # What lower(auto) chooses must not depend on the machine, nor on what else it does: an invented processor's constants.
    os.environ["SPARSEC_CALIBRATION"] = str(ROOT / "tests" / "calibration.json")
    # Triton kernels run in its interpreter where there is no GPU. Read when triton is imported, so it has to stand before.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _refuse_checkout_on_path()


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_not_looked_at_again() -> None:
    """Imports and graphs that are kept for all tests: a collection of garbage, which packing in place asks for, leaves them out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def models_are_traced_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` of a model that looks like an earlier one takes the graph of that."""
    if not request.config.getoption("--trace-anew"):
        from traces import traced  # imports triton, for which pytest_configure has to come first

        for module in ("sparsec.compiler", "sparsec.plan", "sparsec.wrapped"):
            monkeypatch.setattr(f"{module}.trace", traced)


def _refuse_checkout_on_path() -> None:
    """`python -m pytest` puts the checkout on the import path, and with it a `kernels` that transformers looks for."""
    spec = importlib.util.find_spec("kernels")
    if spec is not None and any(Path(p).resolve() == ROOT / "kernels" for p in spec.submodule_search_locations or ()):
        raise pytest.UsageError(
            "the checkout is on the import path, so `import kernels` finds sparsec's folder of that name; "
            "run `pytest` (or `make test`), not `python -m pytest`, and leave the checkout out of PYTHONPATH"
        )


def pytest_unconfigure() -> None:
    """At the end everything is collected: libraries complain of what they are left with."""
    gc.unfreeze()
