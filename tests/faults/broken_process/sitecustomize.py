"""Read by every Python that starts with this folder on its path: breaks the one process of a stage that is meant."""

import os
import sys

if "alignpipe.worker" in sys.orig_argv and os.environ["RANK"] == os.environ["BROKEN_RANK"]:
    from tests.faults.broken_process.breaking import break_phase

    break_phase(os.environ["BROKEN_PHASE"], os.environ["BROKEN_HOW"])
