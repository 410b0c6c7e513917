"""What is communicated on paper; `tests/benchmarks/test_communication.py` compares it with real ranks."""

from megatron_ponder.estimates.communication import Formula
from megatron_ponder.estimates.rank import Rank
from tests.models import small_config


def terms(data: int = 1, place: int = 0, **overrides) -> dict[tuple[str, str], int]:
    """Bytes by axis and operation."""
    config = small_config(training__micro_batch_size=1, training__global_batch_size=4, **overrides)
    sums: dict[tuple[str, str], int] = {}
    for term in Formula(Rank(config, data, place), refinements=1).terms():
        sums[term.axis, term.operation] = sums.get((term.axis, term.operation), 0) + term.bytes
    return sums


def test_one_process_sends_nothing():
    assert terms() == {}


def test_half_the_width_sends_half_the_activations():
    vanilla = {"ponder__mode": "vanilla", "parallel__pipeline": 2}
    wide, narrow = (terms(**vanilla, training__precision=kind)["pipeline", "send"] for kind in ("fp32", "bf16"))
    assert narrow * 2 == wide
    # forward on the first rank: 4 micro-batches of 64 tokens of 32 numbers
    assert narrow == 4 * 64 * 32 * 2


def test_gradients_are_summed_in_fp32_and_weights_shared_as_they_are():
    sums = terms(data=2, training__precision="bf16", parallel__zero_stage=0)  # which runs as stage 1
    count = Rank(small_config()).part.count
    assert sums["copies", "all-reduce"] == 4 * count + 8 + 1  # two norms, and whether all are numbers
    assert 2 * count <= sums["copies", "all-gather"] <= 2 * count + 16
