"""transformers: its server finds, loads and runs the model when started through cla_convert.transformers_cli."""

import sys

from cla_convert.transformers_cli import attach

attach()
from transformers.cli.serving.model_manager import ModelManager  # noqa: E402

manager = ModelManager(device="cpu", dtype="auto")
model, tokenizer = manager.load_model_and_processor(f"{sys.argv[1]}@main")
assert type(model).__name__.startswith("Cla"), type(model)
assert manager.get_model_modality(model, tokenizer).value == "LLM"
prompt = tokenizer("hello", return_tensors="pt")
assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt.input_ids.shape[1] + 3
manager.shutdown()  # else its timers keep the process
