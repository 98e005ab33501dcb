"""Source and converted model side by side on this machine: KV bytes, what fits into a memory, tokens per second."""
