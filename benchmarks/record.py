"""The files that results are kept in."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.machine import current_commit, describe_versions

FORMAT = 1


def describe_run() -> dict[str, Any]:
    """What every record begins with."""
    return {
        "format": FORMAT,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "versions": describe_versions(),
    }


def save_json(record: dict[str, Any], path: Path) -> None:
    """Replace the file whole: a reader or an interruption never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)
