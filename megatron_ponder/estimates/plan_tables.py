"""Tables and sentences about plans: what one needs and takes, which are fastest, what to do where none fits."""

from collections.abc import Sequence

from rich.table import Table

from megatron_ponder.base.counts import counted
from megatron_ponder.cluster.hardware import GIB, Hardware
from megatron_ponder.estimates.budget import Budget
from megatron_ponder.estimates.layout_table import describe_layout
from megatron_ponder.estimates.phases import PhaseCost, phase_costs
from megatron_ponder.estimates.search import KEYS, Plan, changes, flags, nearest

SECONDS_PER_DAY = 86400


def heading(hardware: Hardware) -> str:
    """What the cluster is taken to be."""
    return (
        f"{counted(hardware.nodes, 'node')} of {hardware.gpus_per_node} {hardware.name}: "
        f"{hardware.peak / 1e12:,.0f} TFLOP/s (reached: {hardware.matrix_share:.0%} in products, "
        f"{hardware.attention_share:.0%} in attention), memory {hardware.memory_bandwidth / 1e9:,.0f} GB/s, "
        f"links {hardware.intra_bandwidth / 1e9:,.0f} GB/s in a node and {hardware.inter_bandwidth / 1e9:,.0f} between "
        "nodes, a GPU"
    )


def memory_lines(plan: Plan, hardware: Hardware) -> str:
    """What every rank of a plan holds, and how much of a GPU may be used."""
    return (
        f"{describe_layout(plan.config, plan.data, hardware.device)}\n"
        f"of {hardware.memory / GIB:.1f} GiB a GPU, {hardware.usable_memory / GIB:.1f} are taken to be usable; the "
        f"fullest rank needs {plan.memory.total / GIB:.2f}\n"
    )


def time_table(plan: Plan) -> Table:
    """Where the time of a step goes."""
    table = _right_aligned("a step", "seconds", "share")
    table.columns[0].justify = "left"
    for name, seconds in plan.time.parts.items():
        table.add_row(name, f"{seconds:.4f}", f"{seconds / plan.time.total:.1%}")
    table.add_section()
    table.add_row("together", f"{plan.time.total:.4f}", "100.0%")
    return table


def spent(plan: Plan, hardware: Hardware, budget: Budget) -> list[PhaseCost]:
    """What a run spends in its phases."""
    return phase_costs(plan.config, plan.data, hardware, budget)


def phase_table(parts: Sequence[PhaseCost]) -> Table:
    """What a run computes in its phases, and how long it takes."""
    table = _right_aligned("phase", "optimiser steps", "FLOPs a step", "seconds a step", "FLOPs", "days")
    table.columns[0].justify = "left"
    for part in parts:
        flops, seconds = f"{part.phase.time.flops:.3g}", f"{part.phase.time.total:.4f}"
        table.add_row(
            part.phase.name, f"{part.steps:,.0f}", flops, seconds, f"{part.flops:.3g}", f"{_days([part]):,.2f}"
        )
    table.add_section()
    together = (f"{sum(part.steps for part in parts):,.0f}", "", "", f"{_flops(parts):.3g}", f"{_days(parts):,.2f}")
    table.add_row("together", *together)
    return table


def time_lines(plan: Plan, hardware: Hardware, budget: Budget, parts: Sequence[PhaseCost]) -> str:
    """Communication of a step, then what a run takes that spends so much in its phases."""
    lines = []
    if plan.time.collectives:
        kinds = sorted(plan.time.collectives.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{axis} {operation} {seconds:.4f}" for (axis, operation), seconds in kinds)
        lines.append(
            f"communication in seconds a step: {shown}; {plan.time.hidden:.4f} of it hidden behind computation"
        )
    days = _days(parts)
    lines.append(
        f"{plan.time.tokens_per_second:,.0f} tokens/s, MFU {plan.time.utilisation(hardware):.1%}; {budget.tokens:.3g} "
        f"tokens take {days:,.2f} days, {days * 24 * hardware.ranks:,.0f} GPU-hours, {_flops(parts):.3g} FLOPs"
    )
    return "\n".join(lines)


def total_line(phases: Sequence[Sequence[PhaseCost]], hardware: Hardware) -> str:
    """What the phases of `training.phases` take together, each of them in parts."""
    parts = [part for phase in phases for part in phase]
    days = _days(parts)
    return (
        f"together {days:,.2f} days, {days * 24 * hardware.ranks:,.0f} GPU-hours, {_flops(parts):.3g} FLOPs in "
        f"{sum(part.steps for part in parts):,.0f} steps"
    )


def search_table(plans: Sequence[Plan], most: int, hardware: Hardware, budget: Budget) -> Table:
    """A row for each of the first so many plans."""
    usable = f"{hardware.usable_memory / GIB:.1f} of {hardware.memory / GIB:.1f} GiB"
    context = any(plan.config.parallel.context > 1 for plan in plans[:most])
    grid = ("tensor", *("context",) * context, "pipeline", "data")
    headings = (*grid, "ZeRO", "recompute", "micro-batch", "GiB", "tokens/s", "MFU", "days")
    table = _right_aligned("", *headings, "GPU-hours")
    table.title = f"{len(plans):,} layouts fit into the usable {usable} of a GPU"
    for number, plan in enumerate(plans[:most], 1):
        parallel, training, days = plan.config.parallel, plan.config.training, _days(spent(plan, hardware, budget))
        table.add_row(
            str(number),
            f"{parallel.tensor}{' + sequence' if parallel.sequence_parallel else ''}",
            *(str(parallel.context),) * context,
            str(parallel.pipeline),
            str(plan.data),
            str(parallel.zero_stage),
            training.recompute,
            str(training.micro_batch_size),
            f"{plan.memory.total / GIB:.1f}",
            f"{plan.time.tokens_per_second:,.0f}",
            f"{plan.time.utilisation(hardware):.1%}",
            f"{days:,.2f}",
            f"{days * 24 * hardware.ranks:,.0f}",
        )
    return table


def does_not_fit(plan: Plan, hardware: Hardware, plans: Sequence[Plan]) -> str:
    """One line with the nearest layout that does."""
    found = nearest(plan.config, plans)
    if found is None:
        return nothing_fits(hardware)
    return (
        f"{plan.memory.total / GIB:.1f} GiB on the fullest rank do not fit into {hardware.usable_memory / GIB:.1f}; "
        f"add {flags(changes(plan.config, found.config))}, which needs {found.memory.total / GIB:.1f} GiB and makes "
        f"{found.time.tokens_per_second:,.0f} tokens/s"
    )


def nothing_fits(hardware: Hardware) -> str:
    """One line for a model that is too large."""
    return (
        f"no layout of this model fits into {hardware.usable_memory / GIB:.1f} GiB on each of "
        f"{counted(hardware.ranks, 'rank')}; use more nodes, or offload the optimiser with "
        "--parallel.zero_stage 3 (of Muon 2) --parallel.offload_optimizer cpu"
    )


def as_dict(plan: Plan, hardware: Hardware, budget: Budget) -> dict:
    """A plan as JSON knows it."""
    parts = spent(plan, hardware, budget)
    days = _days(parts)
    return {
        **{f"{section}.{key}": getattr(getattr(plan.config, section), key) for section, key in KEYS},
        "data": plan.data,
        "ranks": hardware.ranks,
        "fits": plan.memory.total <= hardware.usable_memory,
        "memory": {**vars(plan.memory), "total": plan.memory.total},
        "usable_memory": hardware.usable_memory,
        "step_seconds": plan.time.total,
        "parts": plan.time.parts,
        "collectives": {" ".join(key): value for key, value in plan.time.collectives.items()},
        "hidden": plan.time.hidden,
        "tokens_per_second": plan.time.tokens_per_second,
        "mfu": plan.time.utilisation(hardware),
        "tokens": budget.tokens,
        "phases": [
            {
                "name": part.phase.name,
                "begin": part.phase.begin,
                "steps": part.steps,
                "batches": part.batches,
                "step_flops": part.phase.time.flops,
                "step_seconds": part.phase.time.total,
            }
            for part in parts
        ],
        "flops": _flops(parts),
        "days": days,
        "gpu_hours": days * 24 * hardware.ranks,
    }


def _days(parts: Sequence[PhaseCost]) -> float:
    return sum(part.seconds for part in parts) / SECONDS_PER_DAY


def _flops(parts: Sequence[PhaseCost]) -> float:
    return sum(part.flops for part in parts)


def _right_aligned(*headings: str) -> Table:
    table = Table(*headings)
    for column in table.columns:
        column.justify = "right"
    return table
