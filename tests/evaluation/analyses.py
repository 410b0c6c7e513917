"""An analysis that several files of tests look at."""

import functools
from pathlib import Path

from megatron_ponder.evaluation.analysis import Analysis, analyse
from megatron_ponder.evaluation.analysis_plan import AnalysisPlan, Subject
from tests.models import random_tokens, small_model

EXITS = {"entropies": (0.0, 1000.0), "margins": (0.001,)}
SWEEPS = {"thresholds": (0.1, 0.6), "biases": (-2.0, 2.0)} | EXITS
PLAN = AnalysisPlan(refinements=1, random_draws=2, iterations=4, listed=60, **SWEEPS)
# A token that would end a script if the page did not escape it, spaces and a line end.
PIECES = ["</script>", "▁word", "\\n", "<b>", "&amp;"]


def piece(token: int) -> str:
    return PIECES[token] if token < len(PIECES) else f"▁t{token}"


@functools.cache
def analysis_of_small_models() -> Analysis:
    """Of a model of each mode, on random tokens with random depths."""
    subjects = []
    for mode in ("adaptive", "fixed", "vanilla"):
        model = small_model(router_scale=4.0, ponder__mode=mode, inference__threshold=0.3).eval()
        subjects.append(Subject(mode, model, Path("runs") / mode, 1))
    batches, depths = [random_tokens(3, 41, vocab_size=12)], [random_tokens(3, 41, vocab_size=4, seed=1) - 1]
    return analyse(subjects, batches, PLAN, piece, depths)
