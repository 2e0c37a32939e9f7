"""Benchmarks: a file per op, and the harness that owns the clock. `fastlm bench` runs them."""
