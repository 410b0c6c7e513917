from megatron_ponder.base.counts import counted, first_of


def test_one_is_one_and_others_are_several():
    assert [counted(number, "checkpoint") for number in (0, 1, 2)] == ["0 checkpoints", "1 checkpoint", "2 checkpoints"]
    assert (counted(1, "pass"), counted(3, "pass"), counted(12_000, "micro-batch")) == (
        "1 pass",
        "3 passes",
        "12,000 micro-batches",
    )


def test_the_others_are_counted():
    assert [first_of(names, "tensor") for names in (["b"], ["b", "a"], {"c", "b", "a"})] == [
        "b",
        "a and 1 more tensor",
        "a and 2 more tensors",
    ]
