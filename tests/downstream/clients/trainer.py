"""transformers: a few steps of Trainer, then its saved model (argument 2)."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer.pad_token = tokenizer.eos_token
ids = torch.tensor(tokenizer("the cat sat on the mat " * 3).input_ids)
rows = [{"input_ids": ids, "labels": ids}] * 16
settings = TrainingArguments(
    sys.argv[2], max_steps=6, per_device_train_batch_size=4, learning_rate=3e-3, logging_steps=1, report_to="none",
    use_cpu=True, save_strategy="no", activation_checkpointing=True,
    activation_checkpointing_kwargs={"use_reentrant": False},
)  # fmt: skip
trainer = Trainer(model, settings, train_dataset=rows, processing_class=tokenizer)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
assert losses[-1] < 0.9 * losses[0], losses
trainer.save_model()
assert "cla_convert" not in sys.modules
