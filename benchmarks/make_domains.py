"""Make cla_convert/evaluation/domains/*.jsonl: seven kinds of text on which every run measures what was recovered.

    python benchmarks/make_domains.py CORPUS_FOLDER SITE_PACKAGES

CORPUS_FOLDER holds parquet files (columns id, text), one a source; SITE_PACKAGES the Python packages named below.
Whole documents, chosen by a hash of their ids, so that whoever trains on the same corpora can leave them out; licences
stand in cla_convert/evaluation/domains/README.md.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

BYTES = 30_000
"""Of a domain, about."""
CODE = ["attr/_cmp.py", "attr/filters.py", "attr/converters.py", "click/_textwrap.py", "click/formatting.py"]
OUT = Path(__file__).parents[1] / "cla_convert" / "evaluation" / "domains"


class Part(NamedTuple):
    """Documents of a corpus: which, how long, and how much of the domain they make."""

    corpus: str
    ids: str
    sizes: tuple[int, int]
    share: float = 1.0


DOMAINS = {
    "encyclopaedia": [Part("wikipedia", r"enwiki/\d{1,7}/", (2500, 8000))],
    "web": [Part("web_genres", r"ewt/(weblog|answers)", (1200, 6000))],
    "news": [
        Part("web_genres", "gum/GUM_news", (2000, 8000), 0.5), Part("web_genres", "onestop/", (2000, 8000), 0.5),
    ],
    "law": [Part("us_code", "usc/", (1500, 6000), 0.5), Part("court_opinions", "scotus/", (2500, 9000), 0.5)],
    "science": [
        Part("plos_articles", "plos/", (10_000, 20_000), 0.5),
        Part("web_genres", "gum/GUM_academic", (2500, 9000), 0.5),
    ],
    "dialogue": [Part("dialogues", "sgd/", (800, 2500), 0.5), Part("dialogues", "TM-", (400, 2500), 0.5)],
}  # fmt: skip


def chosen(rows: list[dict[str, str]], part: Part) -> list[dict[str, str]]:
    """Documents of a part, in the order of their hashes, until its share of the domain is full."""
    low, high = part.sizes
    fitting = [r for r in rows if re.match(part.ids, r["id"]) and low <= len(r["text"].encode()) <= high]
    taken, size = [], 0
    for row in sorted(fitting, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest()):
        if size >= 0.9 * part.share * BYTES:
            break
        taken.append({"id": f"{part.corpus}: {row['id']}", "text": row["text"]})
        size += len(row["text"].encode())
    return taken


def main(corpus: Path, packages: Path) -> None:
    """Write the files and say what is in them."""
    tables: dict[str, list[dict[str, str]]] = {}
    domains = {}
    for name, parts in DOMAINS.items():
        for part in parts:
            if part.corpus not in tables:
                tables[part.corpus] = pq.read_table(corpus / f"{part.corpus}.parquet").to_pylist()
        groups = [chosen(tables[part.corpus], part) for part in parts]
        # In turns, so that any beginning of the file holds every kind.
        longest = max(map(len, groups))
        domains[name] = [group[i] for i in range(longest) for group in groups if i < len(group)]
    domains["code"] = [{"id": name, "text": (packages / name).read_text(encoding="utf-8")} for name in CODE]
    for name, documents in domains.items():
        lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        (OUT / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        size = sum(len(document["text"].encode()) for document in documents)
        print(f"| {name} | {len(documents)} | {size} | {', '.join(document['id'] for document in documents)} |")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
