"""The build backend: that of setuptools, which also asks for the CUDA compiler's wheels where there is no toolkit."""

from __future__ import annotations

from typing import Any

from setuptools.build_meta import (  # noqa: F401  (the hooks that pip calls)
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_tools.toolchain import missing_nvcc_requirements


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return list(missing_nvcc_requirements())


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return list(missing_nvcc_requirements())


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return []
