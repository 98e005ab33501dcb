"""Write the rows of the offline task pack (cla_convert/evaluation/tasks/*.jsonl) from the full evaluation sets.

    python benchmarks/make_task_pack.py FOLDER [--rows 250] [--seed 0] [--out cla_convert/evaluation/tasks]

FOLDER holds hellaswag/validation.jsonl, piqa/validation.jsonl, winogrande/validation.jsonl, openbookqa/test.jsonl,
boolq/validation.jsonl, arc_easy/test.jsonl, lambada_openai/test.jsonl and wikitext/test_documents.jsonl, with the
columns of the data sets on the Hugging Face hub. Rows are a seeded sample in random order, so that the first n are a
random sample too. The wikitext pages are all kept, shortest first, so that a small `limit` stays affordable. Prints
name, rows, bytes and sha256.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SOURCES = {
    "hellaswag": "hellaswag/validation.jsonl",
    "piqa": "piqa/validation.jsonl",
    "winogrande": "winogrande/validation.jsonl",
    "openbookqa": "openbookqa/test.jsonl",
    "boolq": "boolq/validation.jsonl",
    "arc_easy": "arc_easy/test.jsonl",
    "lambada_openai": "lambada_openai/test.jsonl",
    "wikitext": "wikitext/test_documents.jsonl",
}


def read(path: Path) -> list[Row]:
    # Not splitlines(): it also breaks at U+2028 and friends, which JSON strings may hold.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def with_label(row: Row) -> Row:
    """Name boolq's answer as super_glue does: lm-eval's task reads `label`, 1 for yes."""
    if "label" in row:
        return row
    return {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}


def choose(name: str, rows: list[Row], count: int, seed: int) -> list[Row]:
    if name == "wikitext":
        return sorted(rows, key=lambda row: (len(row["page"]), row["page"]))
    # One generator a task, named by it: the choice for one task does not depend on the others.
    return random.Random(f"{seed}-{name}").sample(rows, min(count, len(rows)))


def write(path: Path, rows: list[Row]) -> str:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("cla_convert/evaluation/tasks"))
    options = parser.parse_args()
    for name, file in SOURCES.items():
        rows = [with_label(row) if name == "boolq" else row for row in read(options.folder / file)]
        chosen = choose(name, rows, options.rows, options.seed)
        path = options.out / f"{name}.jsonl"
        digest = write(path, chosen)
        print(f"| {name} | {len(chosen)} of {len(rows)} | {path.stat().st_size} | `{digest}` |")


if __name__ == "__main__":
    main()
