"""Runs the target server with a target that takes S seconds longer: ``serve_slowly.py S …``."""

import runpy
import sys
import time

from nemo_speculative.targets.hf import HFTarget

if __name__ == "__main__":
    seconds, *overrides = sys.argv[1:]
    compute_hidden_states = HFTarget.compute_hidden_states

    def slowly(self, batch):
        if batch.num_tokens > 8:  # not the probe when it is loaded
            print("reading", flush=True)
            time.sleep(float(seconds))
        return compute_hidden_states(self, batch)

    HFTarget.compute_hidden_states = slowly
    sys.argv = ["serve_target", *overrides]
    runpy.run_module("nemo_speculative.serve_target", run_name="__main__", alter_sys=True)
