"""What the plugins share: they can be switched off, say in the log what they do, and never stop a server."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping

from flash_mla import value_checks
from flash_mla._version import __version__

DISABLING_VARIABLE = "FLASH_MLA_DISABLE_PLUGINS"


class Refusal(Exception):
    """Why a plugin does not register, in one sentence."""


def is_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    return value_checks.is_switched_on(environ, DISABLING_VARIABLE)


def run(framework: str, log: logging.Logger, register: Callable[[], str]) -> None:
    """Register, and log in one line what came of it.

    Args:
        framework: its name, for messages.
        log: where the framework's users see it.
        register: returns what to log; raises Refusal where this package cannot be used.

    Frameworks run plugins in each of their processes while they start, so no exception leaves.
    """
    if is_disabled():
        log.info("%s does without flash_mla: %s is set", framework, DISABLING_VARIABLE)
        return
    try:
        done = register()
    except Refusal as refusal:
        log.warning("%s does without flash_mla: %s", framework, refusal)
    except Exception as error:
        log.warning("%s does without flash_mla: %s: %s", framework, type(error).__name__, error)
    else:
        log.info(done)


@functools.cache
def log_first_use(framework: str, log: logging.Logger) -> None:
    """Say once per process that a model decodes with this package: that it is registered does not mean it is chosen."""
    log.info("%s decodes with flash_mla %s", framework, __version__)
