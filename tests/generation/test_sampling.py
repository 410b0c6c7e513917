"""How tokens are chosen, against definitions written out."""

import math

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.generation.sampling import Chooser, Sampling, choose

VOCABULARY, DRAWS = 12, 3000
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OCCURRED = [1, 4, 4, 7]


class EvenChooser(Chooser):
    """Draws one number of an even grid, so that many of them give probabilities without noise."""

    def __init__(self, sampling: Sampling, place: int) -> None:
        super().__init__(sampling, OCCURRED)
        self._drawn = (place + 0.5) / DRAWS

    def draw(self) -> float:
        return self._drawn


def distribution(sampling: Sampling) -> list[float]:
    """Probabilities of the tokens, one definition after another."""
    logits = LOGITS.tolist()
    for token in set(OCCURRED):
        positive = logits[token] > 0
        logits[token] *= 1 / sampling.repetition_penalty if positive else sampling.repetition_penalty
    weights = [math.exp(logit / sampling.temperature) for logit in logits]
    order = sorted(range(VOCABULARY), key=lambda token: -weights[token])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(weights[token] for token in order)
    nucleus = []
    for token in order:
        if sum(weights[each] for each in nucleus) < sampling.top_p * total:
            nucleus.append(token)
    kept = [token for token in nucleus if weights[token] >= sampling.min_p * weights[order[0]]]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(VOCABULARY)]


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 99},
        {"top_p": 0.3},
        {"top_p": 0.85},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {"temperature": 1.6, "top_k": 8, "top_p": 0.8, "min_p": 0.2, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_definition(rules):
    sampling = Sampling(**{"temperature": 1.0} | rules)
    choosers = [EvenChooser(sampling, place) for place in range(DRAWS)]
    tokens = choose(LOGITS.repeat(DRAWS, 1), choosers)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCABULARY) / DRAWS
    expected = distribution(sampling)
    assert counts.tolist() == pytest.approx(expected, abs=1.01 / DRAWS)
    assert [token for token in range(VOCABULARY) if counts[token] == 0 and expected[token] > 2 / DRAWS] == []
    assert [token for token in range(VOCABULARY) if counts[token] and not expected[token]] == []


def test_greedy_is_the_argmax_after_the_penalty():
    assert choose(LOGITS.clone()[None], [Chooser(Sampling(), [])]) == [int(LOGITS.argmax())]
    best = int(LOGITS.argmax())
    penalized = LOGITS.clone()
    penalized[best] /= 4
    assert choose(LOGITS.clone()[None], [Chooser(Sampling(repetition_penalty=4), [best])]) == [int(penalized.argmax())]


def test_what_was_chosen_has_occurred():
    chooser = Chooser(Sampling(repetition_penalty=100), [])
    tokens = [choose(LOGITS.clone()[None], [chooser])[0] for _ in range(int((LOGITS > 0).sum()))]
    assert len(set(tokens)) == len(tokens)
    assert set(tokens) == set((LOGITS > 0).nonzero().flatten().tolist())


def test_a_choice_does_not_depend_on_its_batch():
    rules = [Sampling(), Sampling(temperature=1), Sampling(temperature=2, top_p=0.7, seed=4), Sampling(1.5, 0.7, 3)]
    logits = torch.randn(len(rules), 50, generator=torch.Generator().manual_seed(0))

    def choosers():
        return [Chooser(rule, [3, 5]) for rule in rules]

    together, alone, backwards = choosers(), choosers(), choosers()[::-1]
    for _ in range(20):
        tokens = choose(logits.clone(), together)
        assert tokens == [choose(logits[[row]].clone(), [alone[row]])[0] for row in range(len(rules))]
        assert tokens == choose(logits.flip(0).clone(), backwards)[::-1]


def test_seeds():
    def tokens(seed):
        chooser = Chooser(Sampling(temperature=1, seed=seed), [])
        return [choose(LOGITS.clone()[None], [chooser])[0] for _ in range(30)]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)
    assert tokens((1 << 63) - 1)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"temperature": -1}, "temperature is -1; its range is 0, or 1e-6 to 100"),
        ({"temperature": 1e-300}, "temperature is 1e-300"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; its range is 0 to 1e9"),
        ({"top_k": 10**400}, "top_k is a number of 401 digits"),
        ({"top_p": 0}, "top_p is 0; its range is 1e-6 to 1"),
        ({"top_p": 1e-300}, "top_p is 1e-300"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1; its range is 0 to 1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; its range is 0.01 to 100"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty is 1e-40"),
        ({"repetition_penalty": 1e40}, "repetition_penalty is 1e40"),
        ({"seed": -1}, "seed is -1; its range is 0 to"),
        ({"seed": 1 << 63}, "seed is 9,223,372,036,854,775,808"),
    ],
    ids=str,
)
def test_refusals(rules, message):
    with pytest.raises(UserError, match=message):
        Sampling(**rules)
