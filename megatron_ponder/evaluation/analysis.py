"""Where latent steps help: every measurement of one or several trained models, as tables and a summary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from megatron_ponder.evaluation.analysis_plan import PAPER_THRESHOLD, AnalysisPlan, Subject
from megatron_ponder.evaluation.perplexity import Setting
from megatron_ponder.evaluation.pondering import TokenMeasurements, contraction, measure, refined_losses, shuffled
from megatron_ponder.evaluation.sources import flat_labels
from megatron_ponder.evaluation.statistics import (
    equal_parts,
    explained_by_groups,
    group_means,
    rank_correlation,
    standard_error,
)

# What the paper states of its own model.
PAPER_FACTOR = 0.43
HALVES = ("easy", "hard")
PARTS = 10

Row = dict[str, str | int | float | bool | None]


@dataclass
class Analysis:
    """What was measured.

    Attributes:
        tables: rows by name; a figure is drawn from each but `tokens` and `token_strings`.
        summary: of each subject by label: what it is, single figures, and why some are missing.
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    summary: dict[str, dict] = field(default_factory=dict)

    def add(self, table: str, **row) -> None:
        """Append one row."""
        self.tables.setdefault(table, []).append(row)


def analyse(
    subjects: Sequence[Subject],
    batches: Sequence[Tensor],
    plan: AnalysisPlan,
    piece: Callable[[int], str],
    depths: Sequence[Tensor] | None = None,
    announce: Callable[[str], None] = lambda what: None,
) -> Analysis:
    """Measure every subject on the same tokens.

    Args:
        subjects: the models.
        batches: int64 (B, L + 1) each.
        plan: what to measure.
        piece: printable form of a token id.
        depths: true depth of every token of the batches, -1 for none.
        announce: told what comes next.

    Raises:
        UserError: if there is nothing to measure.
    """
    analysis = Analysis()
    stated = None if depths is None else flat_labels(depths)
    for subject in subjects:
        _SubjectAnalysis(analysis, subject, batches, plan, piece, announce).run(stated)
    return analysis


class _SubjectAnalysis:
    def __init__(
        self,
        analysis: Analysis,
        subject: Subject,
        batches: Sequence[Tensor],
        plan: AnalysisPlan,
        piece: Callable[[int], str],
        announce: Callable[[str], None],
    ) -> None:
        self.subject, self.model, self.batches, self.plan, self.piece = subject, subject.model, batches, plan, piece
        self.announce, self.analysis = announce, analysis
        self.own = Setting(self.model.rule("hard"), plan.refinements)

    def run(self, stated: np.ndarray | None) -> None:
        config, inference = self.model.ponder_config, self.model.inference
        own = self.measure("as trained", self.own)
        self.summary = self.analysis.summary[self.subject.label] = {
            "checkpoint": str(self.subject.checkpoint),
            "mode": config.mode,
            "max_steps": config.steps,
            "threshold": inference.threshold if self.subject.decides else None,
            "router_bias": inference.router_bias if self.subject.decides else None,
            "evaluation": self.own.name,
            "tokens": len(own.loss),
            "loss": float(own.loss.mean()),
            "mean_steps": float(own.executed.mean()),
            "kv_entries": self.model.passes.kv_entries(float(own.executed.mean())),
            "missing": [],
        }
        self.sequences(own)
        if self.subject.decides:
            halves = equal_parts(own.first_loss, 2)
            self.sweeps(own, halves)
            self.difficulty(own)
            self.strings(own)
        else:
            self.quality("trained", own)
            self.exits()
            self.summary["missing"].append(
                f"sweeps, steps by difficulty and shifts of the router: mode {config.mode} has no router"
            )
        self.benefit(own)
        iterates = self.contraction()
        exact = self.gaps(iterates) if iterates or self.subject.decides else None
        if iterates:
            self.refinements(exact)
        if stated is not None:
            self.depth(own, stated)

    def measure(self, what: str, setting: Setting) -> TokenMeasurements:
        self.announce(f"{self.subject.label}: {what}, {setting.name}")
        return measure(self.model, self.batches, setting)

    def add(self, table: str, **row) -> None:
        self.analysis.add(table, model=self.subject.label, mode=self.model.ponder_config.mode, **row)

    def sweeps(self, own: TokenMeasurements, halves: np.ndarray) -> None:
        """Loss against mean K̂ over τ and over α, random choices of K̂, and what α does to each half of the tokens."""
        thresholds, biases = self.plan.sweep(self.model)
        for threshold in thresholds:
            rule = replace(self.own.rule, threshold=threshold)
            measured = self.at(f"τ = {threshold:g}", rule, own)
            self.quality("threshold", measured)
            for seed in range(self.plan.random_draws):
                random = replace(self.own, rule=shuffled(measured, seed))
                control = self.measure(f"random K̂ at the mean of τ = {threshold:g}", random)
                self.quality("random", control, seed)
        reference = [own.loss[halves == half].mean() for half in range(2)]
        for bias in biases:
            measured = self.at(f"α = {bias:g}", replace(self.own.rule, bias=bias), own)
            self.quality("bias", measured)
            for half, name in enumerate(HALVES):
                loss = measured.loss[halves == half].mean()
                self.add(
                    "shifting",
                    evaluation=self.own.name,
                    half=name,
                    threshold=measured.setting.rule.threshold,
                    bias=bias,
                    own=measured.setting == self.own,
                    mean_steps=float(measured.executed.mean()),
                    half_mean_steps=float(measured.executed[halves == half].mean()),
                    loss=float(loss),
                    loss_change=float(loss - reference[half]),
                )

    def exits(self) -> None:
        """Loss against mean K̂ where tokens stop by their confidence."""
        for exit in self.plan.exits if self.subject.can_exit else ():
            setting = Setting(replace(self.own.rule, exit=exit), None)
            self.quality(exit.measure, self.measure("confidence exit", setting))

    def at(self, what: str, rule, own: TokenMeasurements) -> TokenMeasurements:
        setting = replace(self.own, rule=rule)
        return own if setting == self.own else self.measure(what, setting)

    def quality(self, sweep: str, measured: TokenMeasurements, seed: int | None = None) -> None:
        decides, rule = self.subject.decides, measured.setting.rule
        threshold = rule.threshold if decides else None
        self.add(
            "quality_compute",
            evaluation=measured.setting.name,
            sweep=sweep,
            threshold=threshold if rule.exit is None else rule.exit.threshold,
            bias=rule.bias if decides else None,
            own=measured.setting == self.own,
            seed=seed,
            mean_steps=float(measured.executed.mean()),
            loss=float(measured.loss.mean()),
            mflops=float(measured.flops.mean() / 1e6),
        )

    def benefit(self, own: TokenMeasurements) -> None:
        """ΔCE and the loss before any latent step, by K̂."""
        if not self.model.ponder_config.steps:
            self.summary["missing"].append("what the steps gain: there are none")
            return
        if own.gain is None:
            self.summary["missing"].append(
                f"what the steps gain: mode {self.model.ponder_config.mode} shows no prediction from before its steps"
            )
            return
        for steps in range(self.model.ponder_config.steps + 1):
            chosen = own.executed == steps
            if chosen.any():
                self.add(
                    "benefit",
                    evaluation=self.own.name,
                    steps=steps,
                    tokens=int(chosen.sum()),
                    gain=float(own.gain[chosen].mean()),
                    gain_standard_error=standard_error(own.gain[chosen]),
                    first_loss=float(own.first_loss[chosen].mean()),
                    first_loss_standard_error=standard_error(own.first_loss[chosen]),
                )

    def difficulty(self, own: TokenMeasurements) -> None:
        """K̂ against the loss before any latent step, and how much of it the token's identity says."""
        by_identity = group_means(own.executed, own.tokens)
        parts = equal_parts(own.first_loss, PARTS)
        for part in np.unique(parts):
            chosen = parts == part
            self.add(
                "difficulty",
                evaluation=self.own.name,
                part=int(part) + 1,
                tokens=int(chosen.sum()),
                first_loss=float(own.first_loss[chosen].mean()),
                mean_steps=float(own.executed[chosen].mean()),
                mean_steps_standard_error=standard_error(own.executed[chosen]),
                mean_steps_by_identity=float(by_identity[chosen].mean()),
            )
        self.summary["difficulty"] = {
            "rank_correlation": rank_correlation(own.executed, own.first_loss),
            "rank_correlation_by_identity": rank_correlation(by_identity, own.first_loss),
            "rank_correlation_beyond_identity": rank_correlation(own.executed - by_identity, own.first_loss),
            "variance_explained_by_identity": explained_by_groups(own.executed, own.tokens),
            "different_tokens": len(np.unique(own.tokens)),
            "rank_correlation_with_gain": rank_correlation(own.executed, own.gain),
        }

    def strings(self, own: TokenMeasurements) -> None:
        """Mean K̂ of every token string, the most first."""
        ids, inverse, counts = np.unique(own.tokens, return_inverse=True, return_counts=True)
        sums = [np.bincount(inverse, values) / counts for values in (own.executed, own.first_loss, own.gain)]
        rows = sorted(zip(*sums, counts, ids, strict=True), key=lambda row: (-row[0], -row[3], row[4]))
        for mean_steps, first_loss, gain, count, token in rows:
            self.add(
                "token_strings",
                evaluation=self.own.name,
                token=self.piece(int(token)),
                id=int(token),
                count=int(count),
                mean_steps=float(mean_steps),
                first_loss=float(first_loss),
                gain=float(gain),
            )

    def sequences(self, own: TokenMeasurements) -> None:
        """The first tokens with their K̂, s and losses."""
        for index, token in enumerate(own.tokens[: self.plan.listed]):
            distribution = [] if own.distribution is None else own.distribution[index]
            self.add(
                "tokens",
                evaluation=self.own.name,
                position=index,
                token=self.piece(int(token)),
                id=int(token),
                steps=int(own.executed[index]),
                next=self.piece(int(own.labels[index])),
                first_loss=None if own.first_loss is None else float(own.first_loss[index]),
                loss=float(own.loss[index]),
                **{f"s_{step}": float(share) for step, share in enumerate(distribution)},
            )

    def gaps(self, iterates: bool) -> float:
        """What the hard rule changes, where a router decides, and a few parallel passes, where there are iterates.

        Returns:
            The loss of the fixed point by the model's own rule.
        """
        hard, own = self.own.rule, self.model.inference.threshold
        gaps, at_own = [], 0.0
        self.summary["gaps"] = gaps
        rules = [hard]
        if self.subject.decides:
            rules = [replace(hard, threshold=threshold) for threshold in sorted({PAPER_THRESHOLD, own})]
            soft = self.measure("soft–hard gap", Setting(replace(hard, kind="soft"), None)).loss.mean()
        for rule in rules:
            exact = self.measure("gaps", Setting(rule, None)).loss.mean()
            at_own = exact if rule == hard else at_own
            threshold = {"threshold": rule.threshold if self.subject.decides else None}
            if self.subject.decides:
                gaps.append({"of": "hard, exact", "from": "soft, exact", **threshold, "loss": float(exact - soft)})
            for refinements in sorted({0, 3, self.subject.refinements}) if iterates else ():
                way = Setting(rule, refinements)
                loss = self.measure("Jacobi–sequential gap", way).loss.mean() - exact
                gaps.append({"of": way.name, "from": "hard, exact", **threshold, "loss": float(loss)})
        return float(at_own)

    def contraction(self) -> bool:
        """Distance of the Jacobi iterates from their fixed point; whether there are iterates."""
        self.announce(f"{self.subject.label}: contraction, soft, R = 0 .. {self.plan.iterations - 1}")
        found = contraction(self.model, self.batches[: self.plan.contraction_batches], self.plan.iterations)
        if found is None:
            self.summary["missing"].append(
                f"contraction: mode {self.model.ponder_config.mode} has no iterates, its output is the same for every R"
            )
            return False
        for refinements, rmse in enumerate(found.rmse):
            self.add("contraction", rule="soft", refinements=refinements, rmse=rmse, used=refinements < found.fitted)
        self.summary["contraction"] = {
            "rule": "soft",
            "factor": found.factor,
            "fitted_iterates": found.fitted,
            "hidden_rms": found.rms,
            "paper_factor": PAPER_FACTOR,
        }
        return True

    def refinements(self, exact: float) -> None:
        """Loss with R Jacobi refinements, beside that of the fixed point, which is given."""
        sweep, rule = self.plan.refinement_sweep, self.own.rule
        if not sweep:
            return
        self.announce(f"{self.subject.label}: {rule.kind}, R = {min(sweep)} .. {max(sweep)}")
        for refinements, loss in refined_losses(self.model, self.batches, sweep, rule):
            self.add(
                "refinements",
                rule=rule.kind,
                refinements=refinements,
                trained=refinements == self.subject.refinements,
                loss=loss,
                exact_loss=exact,
                gap=loss - exact,
            )

    def depth(self, own: TokenMeasurements, stated: np.ndarray) -> None:
        """Loss and K̂ by the true depth of what is predicted."""
        for depth in np.unique(stated):
            chosen = stated == depth
            first = None if own.first_loss is None else float(own.first_loss[chosen].mean())
            self.add(
                "depth",
                evaluation=self.own.name,
                depth=None if depth < 0 else int(depth),
                tokens=int(chosen.sum()),
                loss=float(own.loss[chosen].mean()),
                loss_standard_error=standard_error(own.loss[chosen]),
                first_loss=first,
                mean_steps=float(own.executed[chosen].mean()),
                mean_steps_standard_error=standard_error(own.executed[chosen]),
            )
        answers = stated >= 0
        if self.subject.decides and answers.any():
            self.summary["depth"] = {
                "rank_correlation": rank_correlation(own.executed[answers], stated[answers]),
                "mean_steps_of_answers": float(own.executed[answers].mean()),
                "mean_steps_of_others": float(own.executed[~answers].mean()) if (~answers).any() else None,
            }
