"""Make cla_convert/data/sample.parquet from a folder of parquet files (columns id, text), one file per source.

    python benchmarks/make_sample.py CORPUS_FOLDER SITE_PACKAGES cla_convert/data

CORPUS_FOLDER holds the sources but `code`, which is read from the Python packages PACKAGES in SITE_PACKAGES. Only
sources that may be redistributed with the package are used (cla_convert/data/README.md). Long documents are cut at
paragraph ends; `document` names the work a piece comes from, so that its pieces stay on one side of the held-out split.
The result depends on the input files and on the seed only.
"""

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SEED = 0
PIECE = 20_000  # characters: about 5k tokens, so that a budget of 100k tokens sees some 20 works
# Source -> (characters to take, pieces per document at most).
BUDGET = {
    "classic_books": (1_400_000, 2),
    "usgov_web": (900_000, 1),
    "bitcoin_transcripts": (700_000, 2),
    "medquad": (700_000, 1),
    "openstax": (700_000, 1),
    "reviews": (700_000, 1),
    "tech_blogs": (600_000, 1),
    "design_proposals": (500_000, 1),
    "openstax_2": (500_000, 1),
    "sotu": (500_000, 2),
    "business_software_docs": (350_000, 1),
    "fomc_transcripts": (300_000, 2),
    "world_factbook": (300_000, 1),
    "nasa_transcripts": (200_000, 1),
}
# Likewise, of kinds that came later: code and encyclopaedia were where models calibrated without them lost most. Pieces
# of the sources above keep their order, in which the retrieval test reads the books.
ADDED = {"code": (900_000, 1), "wikipedia": (900_000, 1)}
KEPT = {"wikipedia": r"enwiki/\d{1,7}/"}
"""Of wikipedia the pages that are as old as it is: the rest are a stretch of short biographies."""
PACKAGES = ("networkx", "rich", "sklearn", "werkzeug", "pydantic")
NOT_THEIRS = "/(tests?|externals|_unicode_data)/"
"""Tests, tables, and what others wrote."""
FILE = range(2_000, PIECE)
"""Bytes of a source file."""
# Documents that share a 13-gram with an evaluation set (boolq, lambada_openai).
EXCLUDED = {"1868-Johnson-1", "1900-McKinley-1", "1915-Wilson-1", "Jane Austen/Mansfield Park"}
DOMAINS = Path(__file__).parents[1] / "cla_convert" / "evaluation" / "domains"


def cut(text: str, size: int) -> list[str]:
    """Pieces of at most `size` characters that end where a paragraph ends (a line, where a paragraph is longer)."""
    pieces, piece = [], ""
    for part in re.split(r"(?<=\n)(?=\S)" if "\n\n" not in text else r"(?<=\n\n)", text):
        if piece and len(piece) + len(part) > size:
            pieces.append(piece)
            piece = ""
        piece += part
    return [p.strip() for p in [*pieces, piece] if 0 < len(p.strip()) <= size]


def judged() -> set[str]:
    """Ids of the documents on which every run is judged."""
    lines = (line for file in DOMAINS.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines())
    return {json.loads(line)["id"].split(": ", 1)[-1] for line in lines}


def read(source: str, corpus: Path, packages: Path) -> list[dict[str, str]]:
    """All documents of a source that may be taken."""
    if source == "code":
        files = sorted(file for name in PACKAGES for file in (packages / name).rglob("*.py"))
        kept = [f for f in files if not re.search(NOT_THEIRS, f.as_posix()) and f.stat().st_size in FILE]
        return [{"id": str(f.relative_to(packages)), "text": f.read_text(encoding="utf-8")} for f in kept]
    documents = pq.read_table(corpus / f"{source}.parquet").to_pylist()
    left_out = EXCLUDED | judged()
    return [d for d in documents if d["id"] not in left_out and re.match(KEPT.get(source, ""), d["id"])]


def take(source: str, documents: list[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Random documents of one source, from each a few consecutive pieces at a random place."""
    characters, most = (BUDGET | ADDED)[source]
    rows, taken = [], 0
    for document in rng.sample(documents, len(documents)):
        pieces = cut(document["text"], PIECE)
        start = rng.randrange(max(1, len(pieces) - most + 1))
        work = f"{source}/{document['id']}"
        for i, text in list(enumerate(pieces))[start : start + most]:
            rows.append({"id": f"{work}#{i}", "text": text, "source": source, "document": work})
            taken += len(text)
        if taken >= characters:
            break
    return rows


def main(corpus: Path, packages: Path, out: Path) -> None:
    rng = random.Random(SEED)
    rows = [row for source in BUDGET for row in take(source, read(source, corpus, packages), rng)]
    rng.shuffle(rows)
    for row in [row for source in ADDED for row in take(source, read(source, corpus, packages), rng)]:
        rows.insert(rng.randrange(len(rows) + 1), row)
    path = out / "sample.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", compression_level=19, row_group_size=200)
    for source in BUDGET | ADDED:
        mine = [row for row in rows if row["source"] == source]
        documents = len({row["document"] for row in mine})
        print(f"| {source} | {documents} | {len(mine)} | {sum(len(row['text']) for row in mine):,} |")
    print(f"{path}: {path.stat().st_size:,} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
