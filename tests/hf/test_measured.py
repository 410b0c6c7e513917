import json

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.evaluation.harness import Score, TaskEvaluation
from megatron_ponder.evaluation.perplexity import Evaluation
from megatron_ponder.hf.measured import measured_section

STEP = "step-00000240"
ROW = Evaluation("hard, exact", 2048, 5.3782, 216.63, 2.7159, 1.011, [0.0, 0.989, 0.011], 2.011, 1.07e6, 9).as_dict()
ON_TEXT = {"checkpoint": STEP, "data": "the valid part of stdlib", "threshold": 0.02, "router_bias": 0.0}
ON_TEXT |= {"evaluations": [ROW, ROW | {"setting": "soft, exact", "bits_per_byte": None}]}
SCORES = [Score("stdlib_next_line", "acc", 0.34, 0.0336, 200, 0), Score("a|b", "f1 (strict)", 0.5, None, 7, 2)]
ON_TASKS = TaskEvaluation(STEP, "0.4.13", "hard, jacobi(2)", 0.02, 0.0, SCORES).as_dict()


@pytest.fixture
def section(tmp_path):
    """The section about files with these contents."""

    def section(*contents) -> str:
        files = [tmp_path / f"figures{number}.json" for number in range(len(contents))]
        for path, content in zip(files, contents, strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return measured_section(files, STEP)

    return section


def test_what_the_evaluation_wrote(section):
    text, tasks = section(ON_TEXT, ON_TASKS).split("\n\nstep-00000240 under ")
    assert text.startswith(
        "step-00000240 on the valid part of stdlib, 2,048 tokens, with threshold τ = 0.02 and router bias α = 0."
    )
    assert "\n| hard, exact | 5.3782 | 216.63 | 2.7159 | 1.011 | 2.011 | 1.07 |\n" in text
    assert "| soft, exact | 5.3782 | 216.63 | – | 1.011 |" in text
    assert tasks.startswith("lm-evaluation-harness 0.4.13, hard, jacobi(2), with threshold")
    assert "\n| stdlib_next_line | acc | 0.3400 | 0.0336 | 200 | 0 |\n" in tasks
    assert tasks.endswith("\n| a&#124;b | f1 (strict) | 0.5000 | – | 7 | 2 |")


def test_names_and_numbers_of_ones_own(section):
    assert section({"perplexity (hard, R = 3)": 12.5}).endswith("\n| perplexity (hard, R = 3) | 12.5 |")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"figures0\.json is not JSON"),
        ("[]", "must hold a JSON object of measured figures"),
        (ON_TEXT | {"checkpoint": "step-00000160"}, "the figures of step-00000160, but the export is of step-00000240"),
        ({"evaluations": [ROW]}, "the figures of None"),
        (ON_TEXT | {"evaluations": []}, r"lacks figures \(IndexError"),
        (ON_TASKS | {"tasks": [{"task": "x"}]}, r"lacks figures \(KeyError: 'metric'\); write it again"),
    ],
)
def test_other_files_are_refused(section, content, message):
    with pytest.raises(UserError, match=message) as caught:
        section(content)
    assert "\n" not in str(caught.value)
