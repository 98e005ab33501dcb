"""Perplexity of a run folder's models on its held-out text and on wikitext-2 raw test, in windows of 1024 tokens."""

import json
import sys
from importlib.resources import files
from pathlib import Path

import torch

from cla_convert.evaluation.perplexity import token_perplexity
from cla_convert.models.export import load_model, load_tokenizer
from cla_convert.pipeline import measure
from cla_convert.recipe_file import load_recipe
from cla_convert.run import Run

out = Path(sys.argv[1])
run = Run.start(load_recipe(out / "recipe.yaml"), out, overwrite=False)
lines = (files("cla_convert.evaluation.tasks") / "wikitext.jsonl").read_text(encoding="utf-8").splitlines()
ids = load_tokenizer(run.source)("".join(json.loads(line)["page"] for line in lines), return_tensors="pt").input_ids[0]
windows = ids[: len(ids) // 1024 * 1024].view(-1, 1024)
for point, model in run.points.items():
    measure(run, point, model)
    held_out = run.read(f"eval/{point}/held_out.json")
    loaded = load_model(model, dtype=torch.float32, device=run.device)
    wikitext = token_perplexity(loaded, windows, batch_size=4)["perplexity"]
    cache = run.read(f"eval/{point}/kv_cache.json")["bytes_per_token"]
    scores = f"held-out {held_out['perplexity']:.2f} wikitext-2 {wikitext:.2f}"
    print(f"{out.name} {point:9} {scores} cache {cache:.0f} B/token")
train = run.read("train.json")
print(f"{out.name} stages {run.read('environment.json')['stages']} {train['tokens_per_second']:.0f} tokens/s")
