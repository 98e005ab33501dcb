"""Peak memory of a weight-space conversion against the size of the model: it should follow the shard, not the model.

usage: streaming_memory.py FOLDER [LAYERS]     makes a random sharded Llama in FOLDER and converts it in a new process
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

folder, layers = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 24
source = folder / "source"
if not source.exists():
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source, max_shard_size="200MB")
command = ["convert", source, folder / "out", "--init", "mean", "--max-shard-size", "200MB", "--overwrite", "--json"]
done = subprocess.run(
    [sys.executable, "-m", "cla_convert.cli", *map(str, command)], check=True, stdout=subprocess.PIPE, text=True
)
result = json.loads(done.stdout)
size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
print(f"model {size / 2**20:.0f} MiB, peak {result['peak_rss_bytes'] / 2**20:.0f} MiB, {result['seconds']:.1f} s")
