"""A step of the command in a process of its own: `python -m fastlm.benchmarks.gpu.steps STEP [--dry]`."""

import sys

from . import attention_sweep, measurements, proofs
from .place import Place

STEPS = {
    "there": proofs.there, "smoke": proofs.smoke, "part": proofs.part, "sanitize": proofs.sanitize,
    "warm": measurements.warm, "train": measurements.train, "decode": measurements.decode,
    "ops": measurements.measured_ops, "products": measurements.products, "launches": measurements.launches,
    "peers": measurements.peers, "tune": attention_sweep.tune, "compile": attention_sweep.compile,
}

if __name__ == "__main__":
    name, *rest = [argument for argument in sys.argv[1:] if argument != "--dry"]
    STEPS[name](Place("--dry" in sys.argv), *rest)
