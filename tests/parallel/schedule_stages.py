"""Stages of a pipeline's first rank, as far as a schedule looks at them when it is made."""

from types import SimpleNamespace


def schedule_stages(pipeline: int, passes: int) -> list[SimpleNamespace]:
    """One stage for each pass, on the first of so many pipeline ranks."""
    ranks = {stage: stage % pipeline for stage in range(passes * pipeline)}
    return [
        SimpleNamespace(
            group_size=pipeline,
            group_rank=0,
            group=None,
            stage_index=index * pipeline,
            num_stages=len(ranks),
            stage_index_to_group_rank=ranks,
            is_first=index == 0,
            is_last=False,
            has_backward=True,
            submod=None,
        )
        for index in range(passes)
    ]
