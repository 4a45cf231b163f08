"""Table of the durations of tests by directory in tests/README.md.

Renew it with::

    make test ARGS=--cpu-durations=/tmp/default.txt
    make test-slow ARGS=--cpu-durations=/tmp/slow.txt
    .venv/bin/python tests/durations.py /tmp/default.txt /tmp/slow.txt

A file that ``pytest --durations=0`` printed will do as well; it has wall time instead of CPU time.
"""

import re
import sys
from collections import Counter
from pathlib import Path

LINE = re.compile(r"^\s*([\d.]+)s (call|setup|teardown) +(\S.*)$", flags=re.MULTILINE)
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- durations -->\n", "<!-- end of durations -->"


def place_of(test):
    """The directory of a test, or the file where that lies directly in tests; src for doctests."""
    parts = test.partition("::")[0].split("/")
    return parts[0] if parts[0] == "src" else "/".join(parts[:2])


def read(path):
    """Seconds, and numbers of tests, of every place and of all of them."""
    seconds, tests = Counter(), Counter()
    for value, phase, test in LINE.findall(Path(path).read_text(encoding="utf-8")):
        for place in (place_of(test), "**all**"):
            seconds[place] += float(value)
            tests[place] += phase == "call"
    return seconds, tests


def table(default, slow):
    """The rows, longest first."""
    tiers = [read(path) for path in (default, slow)]
    lines = ["| | default: tests | s | slow: tests | s |", "|---|---:|---:|---:|---:|"]
    places = sorted({place for seconds, _ in tiers for place in seconds})
    for place in sorted(places, key=lambda place: -sum(seconds[place] for seconds, _ in tiers)):
        cells = [f"{tests[place]} | {seconds[place]:.1f}" if tests[place] else " | " for seconds, tests in tiers]
        lines.append(f"| {place} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(before + BEGIN + table(*sys.argv[1:]) + END + after, encoding="utf-8")
