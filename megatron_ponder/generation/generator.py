"""Generation by one copy of a model, which one process holds or the tensor and pipeline ranks of a job share.

The first rank drives: it schedules. The others run their part of every forward. Tokens are chosen where the logits
are: by the first rank, or by the last of several pipeline ranks, which sends their ids. With pipeline ranks there are
as many groups of sequences, so that while the last rank works on one group the first works on another.
"""

from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.tokenizer import Tokenizer
from megatron_ponder.generation.far_choices import FarChooser, pack, packed_size, unpack
from megatron_ponder.generation.forward import Forward, Outcome
from megatron_ponder.generation.packing import packed
from megatron_ponder.generation.pool_size import fitted, free_blocks
from megatron_ponder.generation.predictions import pieces_of
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.runner import Runner
from megatron_ponder.generation.scheduler import Scheduler
from megatron_ponder.generation.sequences import Batching, OnToken, Sequence, Usage
from megatron_ponder.generation.static_runner import StaticRunner
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule
from megatron_ponder.parallel.edges import build_edges
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.messages import Mailbox, broadcast


class Generator:
    """Context manager that continues prompts.

    Inside the block, the rank that drives submits requests and calls `step` while there is work; on every other rank,
    entering the block takes part in the work until the driving rank leaves it.

        with Generator(model) as generator:
            if generator.drives:
                sequence = generator.submit(Request(prompt, max_new_tokens=20))
                generator.run()

    Attributes:
        drives: whether this is the rank that schedules.
        sequences_per_forward: of each group, at most.
    """

    def __init__(
        self,
        model: PonderLM,
        mesh: Mesh | None = None,
        rule: Rule | None = None,
        batching: Batching | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Start without requests.

        Args:
            model: in evaluation mode; this rank's part. Its weights must not change while the generator is in use.
            mesh: tensor and pipeline ranks; a single process unless given.
            rule: τ, α and the exit; the model's own unless given.
            batching: limits, of each group of sequences; on GPUs, slots are no more than memory is free for.
            tokenizer: for text and stop strings.

        Raises:
            UserError: the model's router does not read what generation gives it, tokens cannot stop by the exit, or a
                GPU has no room for a cache.
        """
        if model.ponder_config.routes_by_token:
            raise UserError("the model was trained with ponder.router_input token, a control that cannot generate")
        mesh = mesh or Mesh()
        weight = next(model.parameters())
        batching = batching or Batching()
        rule = rule or model.rule("hard")
        if rule.exit is not None:
            rule.exit.check(model.ponder_config)
        self._tensor = mesh.tensor
        self._rank, self._ranks = mesh.pipeline.rank, mesh.pipeline.size
        self._ring = Mailbox(build_edges(mesh.pipeline), weight) if self._ranks > 1 else None
        self.drives = mesh.model.rank == 0 and self._rank == 0 and mesh.tensor.rank == 0
        model = packed(model)
        make, blocks = Runner, None
        if weight.is_cuda:
            make = StaticRunner if mesh.model.size == 1 else Runner
            batching, blocks = fitted(model, batching, free_blocks(model, mesh, self._ranks))
        self._runners = [make(model, rule, batching.max_sequences, blocks) for _ in range(self._ranks)]
        self._steps = model.ponder_config.steps
        self._choosers = [FarChooser(pieces_of(model.model_config, tokenizer)) for _ in self._runners]
        self._schedulers: list[Scheduler] = []
        if self.drives:
            self._schedulers = [
                Scheduler(
                    model.model_config,
                    model.ponder_config,
                    batching,
                    tokenizer,
                    model.eod_id,
                    weight.dtype,
                    chooses=self._ranks == 1,
                    exits=rule.exit is not None,
                )
                for _ in self._runners
            ]
        self._under_way: list[Forward | None] = [None] * self._ranks
        self._turn = 0
        self.sequences_per_forward = batching.max_sequences

    def __enter__(self) -> "Generator":
        if not self.drives:
            self._follow()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None and not issubclass(kind, UserError):
            return  # the other ranks may be in the middle of a forward; they end with this process
        if self.drives:
            for group in range(self._ranks):
                if self._under_way[group] is not None:
                    self._collect(group)
                    broadcast((group, True, None), self._tensor)
            broadcast(None, self._tensor)
            self._stop_next()
        if self._ring is not None:
            self._ring.close()

    @property
    def groups(self) -> int:
        """Groups of sequences, one for each pipeline rank."""
        return self._ranks

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run."""
        # Compared with None, as a forward without slots, which frees memory, counts as false.
        under_way = any(forward is not None for forward in self._under_way)
        return all(scheduler.idle for scheduler in self._schedulers) and not under_way

    @property
    def live(self) -> list[Sequence]:
        """Sequences with slots in the cache."""
        return [sequence for scheduler in self._schedulers for sequence in scheduler.live]

    @property
    def waiting(self) -> int:
        """Sequences that have not begun."""
        return sum(len(scheduler.waiting) for scheduler in self._schedulers)

    @property
    def cached_slots(self) -> int:
        """Slots of the live sequences."""
        return sum(scheduler.slots for scheduler in self._schedulers)

    @property
    def usage(self) -> Usage:
        """Counts since the beginning."""
        total = Usage()
        for scheduler in self._schedulers:
            for name, count in vars(scheduler.usage).items():
                setattr(total, name, getattr(total, name) + count)
        return total

    def check(self, request: Request) -> None:
        """Refuse what can never run, as `submit` does.

        Raises:
            UserError: what is wrong with the request.
        """
        self._schedulers[0].check(request)

    def submit(self, request: Request, on_token: OnToken | None = None) -> Sequence:
        """Queue a request with the group that has least to do.

        Args:
            request: what to generate.
            on_token: called with the generation after each of its tokens and at its end.

        Raises:
            UserError: if it can never run.
        """
        scheduler = min(self._schedulers, key=lambda scheduler: len(scheduler.live) + len(scheduler.waiting))
        return scheduler.submit(request, on_token)

    def cancel(self, sequence: Sequence) -> None:
        """Let go of a request; nothing happens to one that has ended."""
        for scheduler in self._schedulers:
            if sequence in scheduler.live or sequence in scheduler.waiting:
                scheduler.cancel(sequence)

    def step(self) -> None:
        """One forward of the group whose turn it is."""
        group, self._turn = self._turn, (self._turn + 1) % self._ranks
        collected = self._under_way[group] is not None
        if collected:
            self._collect(group)
        forward = self._schedulers[group].plan()
        if not collected and forward is None:
            return
        broadcast((group, collected, forward), self._tensor)
        if forward is not None:
            outcome = self._run_part(group, forward)
            if outcome is not None:
                self._schedulers[group].settle(forward, outcome)

    def run(self) -> None:
        """Step until there is nothing left to run."""
        while not self.idle:
            self.step()

    def keep_alive(self) -> None:
        """Let the idle ranks hear from this one, so that none gives up waiting; call it every few minutes at least."""
        assert self.idle
        broadcast((0, False, Forward()), self._tensor)
        if self._run_part(0, Forward()) is None:
            self._receive(0)
            broadcast((0, True, None), self._tensor)

    def _collect(self, group: int) -> None:
        """Wait for the forward of a group that is under way, and take its outcome."""
        forward = self._under_way[group]
        self._schedulers[group].settle(forward, self._receive(group))

    def _receive(self, group: int) -> Outcome:
        """On the first pipeline rank: what the last one hands back of the forward that is under way."""
        forward, self._under_way[group] = self._under_way[group], None
        numbers = self._ring.receive_numbers(packed_size(forward, self._steps))
        _, self._runners[group].read_TX = self._ring.receive()
        return unpack(forward, numbers, self._steps)

    def _follow(self) -> None:
        """Run this rank's part of every forward until the driving rank leaves."""
        if self._rank == 0:
            while (message := broadcast(None, self._tensor)) is not None:
                group, collected, forward = message
                if collected:
                    self._receive(group)
                if forward is not None:
                    self._run_part(group, forward)
        else:
            message, x_TH = self._ring.receive()
            while message is not None:
                self._run_part(*message, x_TH)
                message, x_TH = self._ring.receive()
        self._stop_next()

    def _stop_next(self) -> None:
        if self._rank + 1 < self._ranks:
            self._ring.send(None)

    def _run_part(self, group: int, forward: Forward, received_TH: Tensor | None = None) -> Outcome | None:
        """Run this rank's part of a forward; the outcome if it is the whole, else it is passed on."""
        runner = self._runners[group]
        x_TH = runner.run(forward, received_TH)
        if self._rank + 1 < self._ranks:
            self._ring.send((group, forward), x_TH)
            self._under_way[group] = forward if self._rank == 0 else None
            return None
        outcome = runner.finish(forward, x_TH)
        if self._ranks == 1:
            return outcome
        self._ring.send_numbers(pack(forward, outcome, self._choosers[group].choose(forward, outcome)))
        self._ring.send(None, runner.read_TX)
        return None
