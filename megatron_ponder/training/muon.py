"""Muon: matrices are moved by their momentum with all its singular values made about 1; everything else by AdamW.

It computes what `torch.optim.Muon` does, also where a matrix is spread over tensor ranks, and where ZeRO cuts through
it. A step needs a matrix whole: data ranks that share one send each other their parts of it, tensor ranks gather
theirs, and each computes the whole and takes its own part.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron_ponder.checkpoint.optimizer_state import MUON, is_decayed
from megatron_ponder.config import Config
from megatron_ponder.config.deepspeed import zero_stage
from megatron_ponder.config.run import MUON_ITERATIONS, MuonScaling
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import ParameterSpec, gathered
from megatron_ponder.training.pieces import ParameterPiece, exchange, partitioned_pieces, whole_pieces

Declared = Sequence[tuple[nn.Parameter, ParameterSpec]]
(MOMENTUM,) = MUON
# Keller Jordan's, which PyTorch has too: again and again x ← a x + (b x xᵀ + c (x xᵀ)²) x.
A, B, C = 3.4445, -4.7750, 2.0315
SMALLEST_NORM = 1e-7


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors, whose singular values are about 0.7 to 1.2, in the type of the first."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(MUON_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x


def update_scale(scaling: MuonScaling, rows: int, columns: int) -> float:
    """Factor on the update of a whole matrix."""
    if scaling == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


class MuonWithAdamW(torch.optim.AdamW):
    """Muon for one group of parameters, AdamW for others.

    ZeRO puts a share of all parameters of a group, one behind the other in one tensor, in their place.
    """

    def __init__(
        self, matrices: Declared, others: Sequence[tuple[float, Declared]], config: Config, mesh: Mesh
    ) -> None:
        """Take the parameters; the learning rate is set before every step.

        Args:
            matrices: what Muon takes, with its declarations.
            others: what AdamW takes, in groups with the factor on their learning rate.
            config: of the run. Matrices are made orthogonal in the training precision.
            mesh: the ranks.
        """
        self._settings, self._mesh = config.optimizer, mesh
        self._partitioned = zero_stage(config) > 0
        self._dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        settings = self._settings
        own = 1.0 if settings.muon_learning_rate is None else settings.muon_learning_rate / settings.learning_rate
        groups = [
            {
                "params": [parameter for parameter, _ in declared],
                "specs": [spec for _, spec in declared],
                "muon": declared is matrices,
                "rate_factor": factor,
            }
            for factor, declared in ((own, matrices), *others)
        ]
        super().__init__(groups, lr=0.0, betas=settings.betas, eps=settings.epsilon, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Update what has gradients; a collective of the ranks that share matrices."""
        assert closure is None
        groups = self.param_groups
        for group in groups:
            pieces = [piece for piece in self._pieces(group) if piece.holder.grad is not None]
            if group["muon"]:
                self._move_matrices(pieces, group["lr"])
                continue
            for piece in pieces:
                if is_decayed(len(piece.shape)):
                    piece.of(piece.holder).mul_(1 - group["lr"] * self._settings.weight_decay)
            self.param_groups = [group]
            super().step()
        self.param_groups = groups

    def _pieces(self, group: dict) -> list[ParameterPiece]:
        """What this rank updates of the parameters of a group."""
        parameters, specs, mesh = group["params"], group["specs"], self._mesh
        if self._partitioned:
            return list(partitioned_pieces(*parameters, specs, mesh.tensor, mesh.copies))
        return list(whole_pieces(parameters, specs, mesh.copies))

    def _move_matrices(self, pieces: Sequence[ParameterPiece], rate: float) -> None:
        shared = {index: self._direction(piece) for index, piece in enumerate(pieces) if len(piece.shares) > 1}
        exchange([(pieces[index], part) for index, part in shared.items()], self._mesh.copies)
        for index, piece in enumerate(pieces):
            part = shared[index] if index in shared else self._direction(piece)
            whole = gathered(part.view(piece.shape), piece.spec, self._mesh.tensor)
            moved = piece.spec.shard(orthogonalised(whole), self._mesh.tensor).flatten()
            own, weights = moved[piece.shares[self._mesh.copies.rank]], piece.of(piece.holder)
            scale = update_scale(self._settings.muon_scaling, *piece.spec.shape)
            weights.mul_(1 - rate * self._settings.weight_decay)
            weights.add_(own.to(weights.device), alpha=-rate * scale)

    def _direction(self, piece: ParameterPiece) -> Tensor:
        """Momentum and gradient of a matrix with this rank's numbers set, and its momentum moved on; (numbers,)."""
        state, momentum = self.state[piece.holder], self._settings.muon_momentum
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(piece.holder)
        gradient, average = piece.of(piece.holder.grad), piece.of(state[MOMENTUM])
        average.lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(average, momentum).to(self._mesh.device, self._dtype)
        if len(piece.shares) == 1:
            return direction
        whole = torch.empty(math.prod(piece.shape), dtype=self._dtype, device=self._mesh.device)
        whole[piece.shares[self._mesh.copies.rank]] = direction
        return whole
