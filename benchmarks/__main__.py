"""`python -m benchmarks [decode|plot|report] ...`; decode if no command is named."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import decode, plot, report

COMMANDS = {"decode": decode.main, "plot": plot.main, "report": report.main}


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    return decode.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
