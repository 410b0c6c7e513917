"""Whatever rows take and give back, each has its own blocks, in their order, and none lies behind those in use."""

import random

import numpy as np

from megatron_ponder.generation.block_pool import BLOCK, BlockPool, blocks_of


def test_content_stays_with_its_row():
    draw, rows = random.Random(0), 5
    pool = BlockPool(rows, 9 * BLOCK)
    pool.resize(9 * rows)
    content, expected = {}, [[] for _ in range(rows)]
    tables = np.zeros_like(pool.tables)
    for number in range(300):
        some = np.array(draw.sample(range(rows), draw.randint(1, rows)))
        lengths = np.array([draw.choice([0, 1, 31, 32, 33, 100, 9 * BLOCK]) for _ in some])
        sources, targets = pool.release(some, lengths)
        assert not {*sources} & {*targets}
        content |= {target: content[source] for source, target in zip(sources, targets, strict=True)}
        missing, before = pool.missing(some, lengths), pool.used
        assert pool.take(some, lengths) == slice(before, before + missing)
        for row, length in zip(some, lengths, strict=True):
            blocks = pool.tables[row, : blocks_of(length)]
            kept = expected[row][: len(blocks)]
            assert [content[block] for block in blocks[: len(kept)]] == kept
            expected[row] = kept + [(number, row, order) for order in range(len(kept), len(blocks))]
            content |= dict(zip(blocks, expected[row], strict=True))
        held = [block for row in range(rows) for block in pool.tables[row, : len(expected[row])]]
        assert sorted(held) == list(range(pool.used))
        assert [content[block] for block in held] == [item for row in expected for item in row]
        places, blocks = pool.changes()
        tables.reshape(-1)[places] = blocks
        assert all(
            (tables[row, : len(held)] == pool.tables[row, : len(held)]).all() for row, held in enumerate(expected)
        )
