"""Make cla_convert/data/sample.parquet from a folder of parquet files (columns id, text), one file per source.

    python benchmarks/make_sample.py CORPUS_FOLDER cla_convert/data

Only sources that may be redistributed with the package are used (cla_convert/data/README.md). Long documents are cut at
paragraph ends; `document` names the work a piece comes from, so that its pieces stay on one side of the held-out split.
The result depends on the input files and on the seed only.
"""

import hashlib
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
# Documents that share a 13-gram with an evaluation set (boolq, lambada_openai).
EXCLUDED = {"1868-Johnson-1", "1900-McKinley-1", "1915-Wilson-1", "Jane Austen/Mansfield Park"}


def cut(text: str, size: int) -> list[str]:
    """Pieces of at most `size` characters that end where a paragraph ends (a line, where a paragraph is longer)."""
    pieces, piece = [], ""
    for part in re.split(r"(?<=\n)(?=\S)" if "\n\n" not in text else r"(?<=\n\n)", text):
        if piece and len(piece) + len(part) > size:
            pieces.append(piece)
            piece = ""
        piece += part
    return [p.strip() for p in [*pieces, piece] if 0 < len(p.strip()) <= size]


def take(source: str, path: Path, rng: random.Random) -> list[dict[str, str]]:
    """Random documents of one source, from each a few consecutive pieces at a random place."""
    characters, most = BUDGET[source]
    rows, taken = [], 0
    documents = [d for d in pq.read_table(path).to_pylist() if d["id"] not in EXCLUDED]
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


def main(corpus: Path, out: Path) -> None:
    rng = random.Random(SEED)
    rows = [row for source in BUDGET for row in take(source, corpus / f"{source}.parquet", rng)]
    rng.shuffle(rows)
    path = out / "sample.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", compression_level=19, row_group_size=200)
    for source in BUDGET:
        mine = [row for row in rows if row["source"] == source]
        documents = len({row["document"] for row in mine})
        print(f"| {source} | {documents} | {len(mine)} | {sum(len(row['text']) for row in mine):,} |")
    print(f"{path}: {path.stat().st_size:,} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
