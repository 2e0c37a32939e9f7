"""Measuring: the clock that times contenders in turn, and this machine's roofs."""
