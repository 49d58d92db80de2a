"""Entry point of the group vllm.general_plugins: this package as vLLM's attention backend FLASHMLA.

vLLM calls `register` in each of its processes and imports `vllm_backend` once the backend is chosen. It is for
`--attention-backend FLASHMLA`: vLLM itself prefers another backend on Hopper GPUs.
"""

from __future__ import annotations

import logging
import re

from flash_mla import extension
from flash_mla._version import __version__
from flash_mla.integrations import plugin

BACKEND = "flash_mla.integrations.vllm_backend.FlashMLABackend"
VERSION = (0, 33)  # whose classes vllm_backend extends

log = logging.getLogger("vllm.flash_mla")  # vLLM prints what is logged below "vllm"


def register() -> None:
    """Make this package the backend FLASHMLA, or log in one line why not. May be called any number of times."""
    plugin.run("vLLM", log, _register)


def _register() -> str:
    if (reason := extension.missing_kernels_reason()) is not None:
        raise plugin.Refusal(reason)
    import vllm

    found = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    version = None if found is None else (int(found[1]), int(found[2]))
    expected = ".".join(map(str, VERSION))
    if version is not None and version < VERSION:
        raise plugin.Refusal(f"it needs vLLM {expected} or newer, this is {vllm.__version__}")

    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # Asking torch would initialize CUDA, and vLLM could not fork its workers any more. vLLM asks the driver.
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is None:
        raise plugin.Refusal("vLLM finds no CUDA GPU")
    if tuple(capability) != extension.COMPUTE_CAPABILITY:
        major, minor = capability
        raise plugin.Refusal(f"the CUDA kernels need an sm_90 GPU (H100, H200, H800, H20), this is sm_{major}{minor}")
    register_backend(AttentionBackendEnum.FLASHMLA, BACKEND)
    untried = "" if version == VERSION else f", which it was not tried with: it was written for {expected}"
    return f"flash_mla {__version__} is the attention backend FLASHMLA of vLLM {vllm.__version__}{untried}"
