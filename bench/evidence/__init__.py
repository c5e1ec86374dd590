"""Training evidence: DyKAF beside others on real data, each tuned with the same budget."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs" / "evidence"  # results, one JSONL file per task and size
DATA = OUT / "data"  # downloaded archives
DOCS = ROOT / "docs" / "evidence"  # what the report writes


class EvidenceError(Exception):
    """Something the user can put right; shown as one line, without a traceback."""
