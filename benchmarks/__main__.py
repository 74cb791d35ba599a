"""All cases against their peers: `python -m benchmarks [WORD ...]`; `--quick` for the cheapest of them."""

import sys

from benchmarks import dpo, ppo, rm, sampling, sft
from benchmarks.runner import main

CASES = (*sft.CASES, *rm.CASES, *dpo.CASES, *sampling.CASES, *ppo.CASES)

if __name__ == "__main__":
    sys.exit(main(CASES))
