"""A wheel that carries the built native library is for one platform, and says so in its name.

setuptools takes a distribution without extension modules for one that runs anywhere. The library speaks torch's stable
ABI and none of Python's, so the tag is `py3-none-<platform>`. Read by setuptools (pyproject.toml) from the file itself;
nothing at run time imports it.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel

LIBRARIES = ("*.so", "*.dylib", "*.dll")


class PlatformWheel(bdist_wheel):  # type: ignore[misc]  # setuptools has no types
    """bdist_wheel that looks for a built library among the native sources."""

    def finalize_options(self) -> None:
        native = Path(self.distribution.package_dir["sparsec.kernels"]) / "native"
        self.carries_library = any(next(native.glob(pattern), None) for pattern in LIBRARIES)
        if self.carries_library:
            self.distribution.has_ext_modules = lambda: True  # puts everything where platform files go
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if self.carries_library else (python, abi, platform)
