"""Seconds of `alignpipe run` on the embedded world, and once more with every stage reused.

`python -m benchmarks.pipeline [--runs N] [WORD ...]`; words go to `alignpipe run`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median

# Seconds that each may take.
MAX_WHOLE, MAX_REUSED = 90.0, 3.0
HEAD = "| run | seconds (least, most) | at most |\n| --- | --- | --- |"


def seconds(words: Sequence[str]) -> float:
    """How long one command takes.

    Raises:
        CalledProcessError: it ended with an error.
    """
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "alignpipe", "run", *words], capture_output=True, check=True)
    return time.monotonic() - began


def line(name: str, found: Sequence[float], bound: float) -> str:
    """A line of the table."""
    told = "met" if median(found) <= bound else "no"
    return f"| {name} | {median(found):.1f} ({min(found):.1f}, {max(found):.1f}) | {bound:.0f}: {told} |"


def main() -> None:
    """Run the pipeline from nothing so many times, and behind each of them three times on what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--runs", type=int, default=1)
    given = parser.parse_args()
    whole, reused = [], []
    for _ in range(given.runs):
        with tempfile.TemporaryDirectory() as folder:
            words = [*given.words, f"output_dir='{folder}'"]
            whole.append(seconds(words))
            reused += [seconds(words) for _ in range(3)]
    print(HEAD)
    print(line("whole", whole, MAX_WHOLE))
    print(line("every stage reused", reused, MAX_REUSED))


if __name__ == "__main__":
    main()
