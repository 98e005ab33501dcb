"""PEFT: LoRA on named projections and on all linear layers; trained, saved, loaded, merged (argument 2)."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ids = torch.arange(2, 34)[None]
for targets in (["q_proj", "v_proj"], "all-linear"):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM"))
    owners = sum(".v_proj." in name and "lora_A" in name for name, _ in adapted.named_parameters())
    assert owners == len(set(model.config.kv_source_layers)), owners  # consumers have no v_proj
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(adapted(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0], losses
    folder = Path(sys.argv[2]) / str(len(targets))
    adapted.save_pretrained(folder)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        loaded = PeftModel.from_pretrained(base, folder).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)
merged.save_pretrained(Path(sys.argv[2]) / "merged")

try:  # PEFT's table of defaults goes by model_type and is its own: docs/compatibility.md
    get_peft_model(base, LoraConfig())
except ValueError as error:
    assert "target_modules" in str(error)
else:
    raise AssertionError("LoraConfig() found its target modules: say so in docs/compatibility.md")
assert "cla_convert" not in sys.modules
