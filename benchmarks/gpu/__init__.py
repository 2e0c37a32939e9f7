"""Minutes of a GPU: `python -m benchmarks.gpu` proves and measures what they allow; command.py says how."""
