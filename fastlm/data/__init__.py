"""Text to tokens to batches: tokenizers, llm.c's shards, the loader."""
