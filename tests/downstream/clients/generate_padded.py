"""transformers: batches padded on the left generate what each prompt generates alone, whatever the way of decoding."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float64)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
texts = ["A", "The year 2024", "def f(x):\n    return x"]
WAYS = ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False})
for way in WAYS:
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1, **way}
    alone = [model.generate(**tokenizer(text, return_tensors="pt"), **options)[0, -12:] for text in texts]
    batch = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), **options)[:, -12:]
    assert torch.equal(torch.stack(alone), batch), way
assert "cla_convert" not in sys.modules
