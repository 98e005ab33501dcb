"""The same measurements for every point of a run: lm-eval tasks, perplexity, the KV cache itself."""
