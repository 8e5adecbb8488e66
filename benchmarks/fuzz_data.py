"""Thousands of odd data files, each of which becomes rows or one message, soon.

    python benchmarks/fuzz_data.py --count 10000 --first 0

Real files of each kind, changed as `tests/data/odd_files.py` says, of which the tests run a few hundred.
Every file is prepared as `train` would prepare it. What has another outcome is printed with its seed; the
exit code is 1 then.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> int:
    """Runs them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="Files.")
    parser.add_argument("--first", type=int, default=0, help="Seed of the first one.")
    arguments = parser.parse_args()
    from tests.conftest import build_tokenizer
    from tests.data.odd_files import odd_file
    from tests.data.test_odd_files import answer_to, setup_for

    logging.disable(logging.CRITICAL)
    setup, answers, failed, slowest = setup_for(build_tokenizer()), Counter[str](), Counter[str](), (0.0, 0)
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.first, arguments.first + arguments.count):
            os.environ["MAMBA_SFT_CACHE"] = f"{scratch}/cache{number % 2}"
            started = time.monotonic()
            try:
                answer = answer_to(*odd_file(number), setup, Path(scratch))
                answers["rows" if answer == "rows" else "one message"] += 1
            except Exception as error:
                failed[f"{type(error).__name__}: {error!s:.80}"] += 1
                print(f"seed {number}, {odd_file(number)[0]}")
                traceback.print_exc(limit=-3)
            slowest = max(slowest, (time.monotonic() - started, number))
    print(f"{arguments.count:,} files: {dict(answers)}; slowest {slowest[0]:.1f} s (seed {slowest[1]})")
    for problem, times in failed.most_common():
        print(f"{times:,} x {problem}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
