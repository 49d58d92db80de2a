"""`python -m benchmarks [decode|append|plot|report] ...`; decode if no command is named."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import append, decode, plot, report

COMMANDS = {"decode": decode.main, "append": append.main, "plot": plot.main, "report": report.main}


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    return decode.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
