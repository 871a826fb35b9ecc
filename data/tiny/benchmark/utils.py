"""What lmms-eval calls for the task longva_tiny: a question's visuals, its text, and its score.

What      Functions that longva_tiny.yaml names. `make.py` writes the questions.
Paper     Stands in for the benchmarks of Tables 4, 6 and 7.
Run       python -m data.tiny.benchmark.make && python -m data.benchmarks
Dimensions  none
Differs   The score is the exact answer. `chance` is what a random choice among the possible answers would score.
"""

from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list:
    """A question's pictures, or the file of its film."""
    return [file if file.endswith(".mp4") else Image.open(file).convert("RGB") for file in doc["visuals"]]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The question, below its choices if it has some."""
    return "".join(f" {choice}" for choice in doc["choices"]) + "\n" * bool(doc["choices"]) + doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Scores of one answer, in the mean over all questions and over those of its kind."""
    right = float(results[0].strip(" .") == doc["answer"])
    return {"accuracy": right, doc["kind"]: right, "chance": doc["chance"]}
