"""The whole model: its passes against a naive chain, gradients through them, causality and special cases."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.attention import DEAD
from megatron_ponder.model.attention import Slots
from megatron_ponder.model.geometry import Geometry
from megatron_ponder.model.passes import PassState, pass_slots
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.transformer import Recompute
from megatron_ponder.parallel.sharding import declarations
from tests.grids import in_pairs
from tests.models import LEARNED, random_tokens, small_model

FAMILIES = [{"model__family": "llama", "model__num_kv_heads": 2}, {"model__family": "gpt_neox"}]
MODES = ["vanilla", "fixed", "adaptive"]
ALL_MODES = [*MODES, "pause", "sps", "loop", "ponderlm"]
TINY = {"model__hidden_size": 16, "model__num_heads": 2, "model__ffn_hidden_size": 16}


def soft_loss(model: PonderLM, tokens: Tensor, refinements: int = 2, gradient_passes: int | None = None) -> Tensor:
    """The training loss, with a penalty where there is a router."""
    result = model.jacobi(tokens[:, :-1], refinements, model.rule("soft"), gradient_passes)
    loss = F.cross_entropy(model.head(result.output_BLH).flatten(0, 1), tokens[:, 1:].flatten())
    return loss if result.routing is None else loss + 0.05 * result.routing.log_w[..., 1:].exp().sum(-1).mean()


def gradients(model: PonderLM, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# The chain of passes ----------------------------------------------------------------------------------------------


def naive_chain(model: PonderLM, tokens: list[int], refinements: int, kind: str, threshold: float) -> Tensor:
    """The definition word by word for one sequence, slot lists and all: what the head reads, (L, H)."""
    length, steps = len(tokens), model.ponder_config.steps
    embedded = [model.ponder_config.embedding_scale * model.embedding.weight[token] for token in tokens]
    z: list[list[Tensor]] = [[] for _ in tokens]
    weights = None  # of each token's steps
    run = [0] * length  # latent steps of each token that are not dead in this pass
    passes = [*range(1, steps + 1), *[steps + 1] * (refinements + 1)] if steps else [1]
    for slots in passes:
        sequence = torch.stack([slot for t in range(length) for slot in (embedded[t], *z[t][: slots - 1])])
        positions = torch.tensor([[t for t in range(length) for _ in range(slots)]])
        geometry = Geometry(positions)
        log_w = None
        if weights is not None:
            log_w = torch.stack([weights[t][k] for t in range(length) for k in range(slots)]).unsqueeze(0)
        angles = geometry.angles(1, model.model_config, sequence.dtype)
        states = model.transformer(sequence.unsqueeze(0), Slots(len(sequence), angles, log_w))[0]
        h = [states[t * slots : (t + 1) * slots] for t in range(length)]
        z = [list(h[t]) for t in range(length)]
        if model.router is not None:
            s = [model.router(h[t][0]).softmax(-1) for t in range(length)]
            w = [[s[t][k:].sum() for k in range(steps + 1)] for t in range(length)]
            last = [max(k for k in range(steps + 1) if w[t][k] >= threshold) for t in range(length)]
            dead = torch.tensor(DEAD, dtype=sequence.dtype)
            counted = [min(last[t], run[t]) for t in range(length)]
            run = [min(last[t], run[t] + 1, steps) for t in range(length)]
            weights = [
                [dead if kind == "hard" and k > run[t] else w[t][k].log() for k in range(steps + 1)]
                for t in range(length)
            ]
    if model.router is None:
        return torch.stack([h[t][-1] for t in range(length)])
    if kind == "soft":
        return torch.stack([s[t] @ h[t] for t in range(length)])
    return torch.stack(
        [
            sum(s[t][k] * h[t][k] for k in range(n)) + w[t][n] * h[t][n]
            for t, n in zip(range(length), counted, strict=True)
        ]
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "mode", "kind", "depth"), in_pairs(FAMILIES, MODES, ["soft", "hard"], [(1, 0), (2, 1), (3, 2)])
)
def test_passes_equal_a_naive_chain(family, mode, kind, depth):
    steps, refinements = depth
    model = small_model(router_scale=4.0, ponder__mode=mode, ponder__latent_steps=steps, **family)
    tokens = random_tokens(2, 9)
    got = model.jacobi(tokens, refinements, model.rule(kind, threshold=0.2))
    expected = torch.stack([naive_chain(model, row, refinements, kind, 0.2) for row in tokens.tolist()])
    assert (got.output_BLH - expected).abs().max() < 1e-11
    assert got.passes == len(pass_slots(model.ponder_config.steps, refinements))
    if mode == "adaptive" and kind == "hard":
        assert len(got.routing.executed.unique()) > 1


@torch.no_grad()
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_refinements_converge_to_the_exact_fixed_point(mode, kind):
    model = small_model(router_scale=1.0, ponder__mode=mode)
    tokens, rule = random_tokens(2, 6), model.rule(kind, threshold=0.2)
    exact = model.exact(tokens, rule).output_BLH
    counts = (0, 2, 4, 6, 18)
    errors = [(model.jacobi(tokens, r, rule).output_BLH - exact).abs().max().item() for r in counts]
    assert errors[0] > 1e-3
    assert all(after < before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-11  # after as many passes as there are slots every position is right


@torch.no_grad()
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_early_positions_are_right_first(mode):
    """Each pass puts at least one slot more right, so that K + 1 passes do for one more token."""
    model = small_model(ponder__mode=mode, router_scale=4.0)
    tokens, rule = random_tokens(1, 8), model.rule("hard", threshold=0.2)
    exact = model.exact(tokens, rule).output_BLH
    for count, refinements in ((1, 0), (2, 3), (3, 6)):
        assert len(pass_slots(2, refinements)) == 3 * count
        wrong = (model.jacobi(tokens, refinements, rule).output_BLH - exact).abs().amax(-1)[0] > 1e-11
        assert not wrong[:count].any()
        assert wrong[count:].any() or refinements > 3


# Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ALL_MODES)
def test_gradient_through_all_passes_by_finite_differences(family, mode):
    scale = LEARNED if mode in ("fixed", "adaptive", "loop") else {}
    model = small_model(ponder__mode=mode, **TINY | family | scale)
    tokens = random_tokens(2, 5)
    exact = gradients(model, soft_loss(model, tokens))
    generator = torch.Generator().manual_seed(2)
    step = 1e-4
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        start, values = parameter.detach().clone(), {}
        with torch.no_grad():
            for count in (-2, -1, 1, 2):
                parameter.copy_(start + count * step * direction)
                values[count] = soft_loss(model, tokens).item()
            parameter.copy_(start)
        slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)  # error of order step⁴
        assert slope == pytest.approx((exact[name] * direction).sum().item(), rel=1e-6, abs=1e-9), name
        assert exact[name].any(), name


@pytest.mark.parametrize(("family", "mode", "recompute"), in_pairs(FAMILIES, ALL_MODES, ["block", "attention"]))
def test_recompute_changes_no_gradient(family, mode, recompute):
    model = small_model(ponder__mode=mode, **family)
    tokens = random_tokens(2, 8)
    plain = gradients(model, soft_loss(model, tokens))
    for passes in (None, 1, 3):
        model.recompute = Recompute(recompute, passes)
        again = gradients(model, soft_loss(model, tokens))
        assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("kept", [1, 2, 3, 5])
def test_truncated_gradients_equal_detached_states(mode, kept):
    model = small_model(ponder__mode=mode)
    tokens = random_tokens(2, 8)
    inputs, rule = tokens[:, :-1], model.rule("soft")
    batch, plan = model.read(inputs), pass_slots(2, 2)
    state = None
    for index, slots in enumerate(plan):
        if index == len(plan) - kept and state is not None:
            state = PassState(*[None if part is None else part.detach() for part in state])
        result = model.run_pass(batch, state, rule)
        state = model.next_state(result, rule, min(slots + 1, 3))
    routing = result.routing
    logits = model.head(model.fuse(result.hidden_BLSH, routing, rule))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    if routing is not None:
        loss = loss + 0.05 * routing.log_w[..., 1:].exp().sum(-1).mean()
    expected = gradients(model, loss)
    got = gradients(model, soft_loss(model, tokens, gradient_passes=kept))
    whole = gradients(model, soft_loss(model, tokens))
    name = "transformer.blocks.0.attention.k_proj.weight"
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-10, atol=1e-12)
    assert torch.allclose(got[name], whole[name], rtol=1e-10) == (kept == len(plan))


def test_tied_embeddings_are_one_parameter():
    model = small_model(model__tie_embeddings=True)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    assert [name for name, *_ in declarations(model)] == [name for name, _ in model.named_parameters()]
    untied = small_model()
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            parameter.copy_(model.get_parameter(name))
    tokens = random_tokens(2, 6)
    tied_grad = gradients(model, soft_loss(model, tokens))["embedding.weight"]
    both = gradients(untied, soft_loss(untied, tokens))
    torch.testing.assert_close(tied_grad, both["embedding.weight"] + both["head.weight"])


# What each output may depend on -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("family", "mode", "kind"), in_pairs(FAMILIES, ALL_MODES, ["soft", "hard"]))
def test_no_output_depends_on_a_later_token(family, mode, kind):
    model = small_model(router_scale=4.0, ponder__mode=mode, **family)
    tokens, rule = random_tokens(1, 8), model.rule(kind, threshold=0.2)
    before = model.jacobi(tokens, 2, rule).output_BLH
    for position in (0, 4, 7):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 61
        difference = (model.jacobi(changed, 2, rule).output_BLH - before).abs().amax(-1)[0]
        assert (difference[:position] < 1e-13).all()
        assert (difference[position:] > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("mode", ALL_MODES)
def test_documents_do_not_see_each_other(mode):
    model = small_model(router_scale=4.0, ponder__mode=mode, eod_id=7)
    first, second = torch.tensor([[3, 4, 5, 7]]), torch.tensor([[8, 9, 10]])
    rule = model.rule("soft")
    packed = model.jacobi(torch.cat([first, second], 1), 2, rule).output_BLH
    apart = [model.jacobi(tokens, 2, rule).output_BLH for tokens in (first, second)]
    assert (packed - torch.cat(apart, 1)).abs().max() < 1e-12


# Special cases of adaptive ----------------------------------------------------------------------------------------


def with_constant_routing(step: int) -> PonderLM:
    """Every token puts all its weight on one step."""
    model = small_model()
    with torch.no_grad():
        model.router.output.weight.zero_()
        model.router.output.bias.fill_(-1e5)
        model.router.output.bias[step] = 0
    return model


def alike(model: PonderLM, mode: str) -> PonderLM:
    """The same weights in another mode."""
    scale = model.ponder_config.embedding_scale
    other = small_model(ponder__mode=mode, ponder__embedding_scale=scale)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("router")}
    other.load_state_dict(weights)
    return other


@torch.no_grad()
@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("refinements", [0, 2])
def test_all_weight_on_the_last_step_is_fixed(kind, refinements):
    model, tokens = with_constant_routing(2), random_tokens(2, 10)
    fixed = alike(model, "fixed").jacobi(tokens, refinements, model.rule(kind)).output_BLH
    assert (model.jacobi(tokens, refinements, model.rule(kind)).output_BLH - fixed).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_all_weight_on_step_0_is_vanilla(kind):
    model, tokens = with_constant_routing(0), random_tokens(2, 10)
    vanilla = alike(model, "vanilla").jacobi(tokens, 0, model.rule(kind)).output_BLH
    assert (model.jacobi(tokens, 2, model.rule(kind)).output_BLH - vanilla).abs().max() < 1e-12


@torch.no_grad()
def test_a_threshold_of_0_leaves_soft_and_hard_equal():
    model, tokens = small_model(router_scale=2.0), random_tokens(2, 10)
    outputs = [model.jacobi(tokens, 2, model.rule(kind, threshold=0.0)).output_BLH for kind in ("soft", "hard")]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-12


@torch.no_grad()
def test_rules_come_from_the_configuration_unless_given():
    model = small_model(inference__threshold=0.25, inference__router_bias=-0.5)
    assert (model.rule("hard").threshold, model.rule("hard").bias) == (0.25, -0.5)
    given_rule = model.rule("soft", threshold=0.0, bias=0.0)
    assert (given_rule.kind, given_rule.threshold, given_rule.bias) == ("soft", 0.0, 0.0)


def test_a_router_that_reads_the_token_decides_alike_wherever_it_stands():
    model = small_model(ponder__router_input="token").eval()
    with torch.no_grad():
        model.router.output.weight.normal_(std=0.5)
    tokens = torch.tensor([[3, 7, 3, 5, 7, 3]])
    log_w = model.jacobi(tokens, 1, model.rule("soft")).routing.log_w[0]
    assert torch.equal(log_w[0], log_w[2]) and torch.equal(log_w[0], log_w[5]) and torch.equal(log_w[1], log_w[4])
    assert not torch.allclose(log_w[0], log_w[1])
    context = small_model().eval()
    with torch.no_grad():
        context.router.output.weight.normal_(std=0.5)
    log_w = context.jacobi(tokens, 1, context.rule("soft")).routing.log_w[0]
    assert not torch.allclose(log_w[0], log_w[2])
