"""Perplexity of a run folder's models on its held-out text and on wikitext-2 raw test, in windows of 1024 tokens."""

import json
import sys
from importlib.resources import files
from pathlib import Path

import torch

from cla_convert.environment import pick_device
from cla_convert.evaluation.perplexity import token_perplexity
from cla_convert.files import load_json
from cla_convert.models.export import load_model, load_tokenizer
from cla_convert.recipe_file import load_recipe
from cla_convert.run_folder import RunFolder
from cla_convert.stages.evaluate import measure_cache

folder = RunFolder(Path(sys.argv[1]))
recipe = load_recipe(folder.recipe).recipe
lines = (files("cla_convert.evaluation.tasks") / "wikitext.jsonl").read_text(encoding="utf-8").splitlines()
text = "".join(json.loads(line)["page"] for line in lines)
ids = load_tokenizer(folder.source(recipe))(text, return_tensors="pt").input_ids[0]
windows = ids[: len(ids) // 1024 * 1024].view(-1, 1024)
for point, model in folder.points(recipe).items():
    cache = measure_cache(recipe, folder, point, model).bytes_per_token
    held_out = load_json(folder.evaluation.point(point).measured("held_out"))
    loaded = load_model(model, dtype=torch.float32, device=pick_device(recipe.device))
    wikitext = token_perplexity(loaded, windows, batch_size=4)["perplexity"]
    scores = f"held-out {held_out['perplexity']:.2f} wikitext-2 {wikitext:.2f}"
    print(f"{folder.path.name} {point:9} {scores} cache {cache:.0f} B/token")
train, environment = folder.training.result.read(), folder.environment.read()
assert train and environment
print(f"{folder.path.name} stages {environment.stages} {train.tokens_per_second:.0f} tokens/s")
