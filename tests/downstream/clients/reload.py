"""transformers: two folders (arguments 1 and 2) hold the same model: the same logits, the same tokens."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[1:3]]
tokenizers = [AutoTokenizer.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[1:3]]
ids = [tokenizer("In 2024, naïve café", return_tensors="pt").input_ids for tokenizer in tokenizers]
assert torch.equal(*ids)
with torch.no_grad():
    logits = [model(input_ids=row).logits for model, row in zip(models, ids, strict=True)]
torch.testing.assert_close(*logits, rtol=0, atol=float(sys.argv[3]) if len(sys.argv) > 3 else 0)
assert models[0].config.kv_source_layers == models[1].config.kv_source_layers
assert "cla_convert" not in sys.modules
