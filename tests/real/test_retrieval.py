"""Passkey and needle on a real model: it finds the digits, and the score is what greedy generation says."""

import json

import torch

from cla_convert.evaluation.points import Conditions, evaluate_points
from cla_convert.evaluation.prepare import prepare
from cla_convert.evaluation.quiet import quiet
from cla_convert.evaluation.texts import Texts
from cla_convert.models.export import load_model, load_tokenizer
from cla_convert.recipe import Evaluate

SPEC = Evaluate(
    tasks=["passkey", "needle"], batch_size=2, retrieval={"lengths": [160], "depths": [0.0, 1.0], "samples": 1}
)


def test_the_score_is_exact_match_of_greedy_generation(smollm2, tmp_path):
    evaluate_points({"": smollm2}, SPEC, Conditions(tmp_path, "cpu", 0, Texts()))
    model, tokenizer = load_model(smollm2, dtype="float32"), load_tokenizer(smollm2)
    with quiet():
        prepared = prepare(SPEC, 0, smollm2)
    for task in prepared:
        result = json.loads((tmp_path / "tasks" / f"{task.name}.json").read_text())
        assert result["scores"]["acc"] == 1.0  # the model is able to
        scores = [sample["metrics"]["acc"] for sample in result["samples"]]
        for doc, score in zip(task.tasks["tasks"][task.name].eval_docs, scores, strict=True):
            prompt = tokenizer(doc["prompt"], return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(**prompt, max_new_tokens=1 + len(doc["answer"]), do_sample=False)[0]
            text = tokenizer.decode(output[prompt.input_ids.shape[1] :])
            assert (text == f" {doc['answer']}") == bool(score)
