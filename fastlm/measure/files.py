"""What was measured, as JSON files: in the user's cache, and wherever results go."""

import json
import os
from pathlib import Path


def cache_folder():
    """FASTLM_CACHE, or the folder fastlm in the user's cache."""
    if folder := os.environ.get("FASTLM_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def slug(text):
    """A text as a file's name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)


def write_json(path, value):
    """Writes a file whole or not at all, its folder too."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
