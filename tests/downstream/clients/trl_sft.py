"""TRL: some steps of SFTTrainer, whole and with LoRA, on padded and on packed rows; the saved model (argument 2)."""

import sys

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

texts = ["the cat sat on the mat", "dogs ran over green hills", "ships at sea"] * 8
for packing, lora in ((False, None), (True, LoraConfig(target_modules="all-linear", r=4))):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
    tokenizer.pad_token = tokenizer.eos_token
    settings = SFTConfig(
        sys.argv[2], max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        report_to="none", save_strategy="no", max_length=64, packing=packing, packing_strategy="wrapped", bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, settings, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer, peft_config=lora
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.95 * losses[0], losses
    if lora is None:
        trainer.save_model()
assert "cla_convert" not in sys.modules
