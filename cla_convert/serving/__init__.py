"""Serving CLA models with the small cache. Needs torch, transformers and vLLM; nothing that conversion needs.

vLLM finds `plugin.register` through the entry point `vllm.general_plugins` and calls it in each of its processes.
"""
