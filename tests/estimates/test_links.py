"""What messages travel over, worked out by hand."""

from dataclasses import replace

from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.estimates.communication import Term
from megatron_ponder.estimates.links import Links, collective_seconds
from megatron_ponder.estimates.rank import Rank
from tests.models import small_config

CLUSTER = Hardware("GPU", 4, 8, 80e9, 1e15, 3e12, 400e9, 50e9)


def test_collectives_by_hand():
    term = Term("copies", "all-reduce", "gradients", 3, 800)
    assert collective_seconds(term, 4, bandwidth=100.0, latency=0.5) == 3 * 2 * 2 * 0.5 + 2 * 3 / 4 * 8
    halves = [
        collective_seconds(replace(term, operation=name), 4, 100.0, 0.5) for name in ("all-to-all", "reduce-scatter")
    ]
    assert sum(halves) == collective_seconds(term, 4, 100.0, 0.5)
    assert collective_seconds(replace(term, operation="send"), 4, 100.0, 0.5) == 3 * 0.5 + 8


def test_what_leaves_a_node_takes_the_network():
    cluster = replace(CLUSTER, link_share=1.0)
    config = small_config(parallel__tensor=4)
    links = Links(Rank(config, data=8), cluster)
    assert links.of("tensor") == (4, 400e9, cluster.intra_latency)
    assert links.of("copies") == (8, 2 * 50e9, cluster.inter_latency)  # two members in a node, two ports
    assert Links(Rank(config, data=2), cluster).of("copies") == (2, 400e9, cluster.intra_latency)
    assert Links(Rank(small_config(parallel__pipeline=2), data=16), cluster).of("pipeline")[1] == 50e9
    assert Links(Rank(small_config(), data=32), cluster).of("copies")[1] == 400e9  # eight ports, as fast as inside
