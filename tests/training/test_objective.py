"""The loss of a micro-batch and the sums over its tokens, against plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.model.router import Rule
from megatron_ponder.model.tally import Tally
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.schedules import training_rule
from tests.models import LEARNED, random_tokens, small_config, small_model

TOKENS = random_tokens(3, 18)
RULE = Rule("soft", 0.4)


@pytest.fixture(scope="module")
def model():
    return small_model()


def tally(model, each_step: bool, rule: Rule = RULE) -> Tally:
    return Tally.of(Objective(model)(TOKENS, 2, rule, 0.3, each_step)[1].sum(0))


def nats(model, hidden: torch.Tensor) -> torch.Tensor:
    """(B, L) of what the head predicts from hidden states."""
    return F.cross_entropy(model.head(hidden)[..., :61].transpose(1, 2), TOKENS[:, 1:], reduction="none")


def test_sums_are_those_of_the_formulas(model):
    with torch.no_grad():
        result = model.jacobi(TOKENS[:, :-1], 2, RULE)
        got = tally(model, each_step=True)
        losses = [nats(model, hidden) for hidden in result.hidden_BLSH.unbind(2)]
        whole = nats(model, result.output_BLH)
    s, executed = result.routing.log_s.exp(), result.routing.executed
    assert got.tokens == 51
    assert got.cross_entropy == pytest.approx(float(whole.sum()))
    assert got.mean_loss == pytest.approx(float(whole.mean()))
    assert got.entropy == pytest.approx(float(torch.distributions.Categorical(s).entropy().sum()))
    assert got.penalty == pytest.approx(float((s[..., 1] + 2 * s[..., 2]).sum()))
    assert got.weights == pytest.approx(s.sum((0, 1)).tolist())
    assert got.steps == torch.bincount(executed.flatten(), minlength=3).tolist()
    assert got.own_losses == pytest.approx([float(each.sum()) for each in losses])
    assert min(got.steps) > 0
    table = torch.stack([executed.flatten().double(), losses[0].flatten()])
    assert got.steps_follow_loss == pytest.approx(float(torch.corrcoef(table)[0, 1]))
    assert len(Objective(model)(TOKENS, 2, RULE)[1][0]) == Tally.width(2)


def test_own_losses_are_measured_when_they_are_wanted_and_change_nothing_else(model):
    without, with_them = tally(model, False), tally(model, True)
    assert without.own_losses == [0, 0, 0] and without.first_squared == without.steps_first == 0
    assert without[:5] == with_them[:5]
    losses = [Objective(model)(TOKENS, 2, RULE, 0.3, each_step)[0] for each_step in (False, True)]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sum(gradient.square().sum() for gradient in gradients[0]) > 0


def test_what_is_minimised(model):
    result = model.jacobi(TOKENS[:, :-1], 2, RULE)
    s = result.routing.log_s.exp()
    want = nats(model, result.output_BLH).sum() + 0.3 * (s[..., 1] + 2 * s[..., 2]).sum()
    got, _ = Objective(model)(TOKENS, 2, RULE, 0.3)
    assert got.item() == pytest.approx(want.item())
    expected, gradients = (torch.autograd.grad(loss, list(model.parameters())) for loss in (want, got))
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_before_the_router_starts_the_model_is_a_fixed_one(dtype):
    """Loss, gradients and steps; the router learns nothing, whatever it would say."""
    model, rule = small_model().to(dtype), training_rule(0, small_config(ponder_training__router_start=1))
    fixed = small_model(ponder__mode="fixed", ponder__embedding_scale=model.ponder_config.embedding_scale).to(dtype)
    fixed.load_state_dict({name: value for name, value in model.state_dict().items() if "router" not in name})
    losses, sums = zip(*(Objective(each)(TOKENS, 2, rule, 0.3) for each in (model, fixed)), strict=True)
    penalty = 0.3 * 2 * TOKENS[:, 1:].numel()  # the same for every token
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    assert losses[0].item() - penalty == pytest.approx(losses[1].item(), rel=tolerance)
    assert Tally.of(sums[0].sum(0)).steps == Tally.of(sums[1].sum(0)).steps == [0, 0, 51]
    for loss in losses:
        loss.backward()
    want = dict(fixed.named_parameters())
    for name, parameter in model.named_parameters():
        if "router" in name:
            assert not parameter.grad.any(), name
        else:
            assert (parameter.grad - want[name].grad).norm() <= 10 * tolerance * want[name].grad.norm(), name


@pytest.mark.parametrize("mode", ["fixed", "adaptive", "loop", "ponderlm"])
def test_before_latent_steps_begin_the_model_is_a_vanilla_one(mode):
    """Loss and gradients; what only latent steps need learns nothing."""
    scale = {} if mode == "ponderlm" else LEARNED
    model, rule = (
        small_model(ponder__mode=mode, **scale),
        training_rule(0, small_config(ponder_training__latent_start=1)),
    )
    vanilla = small_model(ponder__mode="vanilla", ponder__embedding_scale=model.ponder_config.embedding_scale)
    shared = vanilla.state_dict().keys()
    vanilla.load_state_dict({name: value for name, value in model.state_dict().items() if name in shared})
    losses, sums = zip(*(Objective(each)(TOKENS, 2, rule, 0.3) for each in (model, vanilla)), strict=True)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    assert Tally.of(sums[0].sum(0)).steps == [51, 0, 0]
    for loss in losses:
        loss.backward()
    want = dict(vanilla.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in shared:
            assert not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, want[name].grad, rtol=1e-10, atol=1e-12)


def test_a_router_that_treats_all_tokens_alike_follows_nothing(model):
    assert tally(model, True, Rule("hard", 0.0)).steps == [0, 0, 51]
    assert tally(model, True, Rule("hard", 0.0)).steps_follow_loss is None


def test_a_step_that_is_never_taken_has_no_entropy():
    model = small_model().float()
    with torch.no_grad():
        model.router.output.weight.zero_()
        model.router.output.bias.copy_(torch.tensor([0.0, 0.0, -200.0]))  # s underflows
    got = tally(model, False)
    assert got.entropy == pytest.approx(51 * math.log(2))
    assert got.weights == pytest.approx([25.5, 25.5, 0])


@pytest.mark.parametrize("mode", ["vanilla", "fixed"])
def test_without_a_router_all_tokens_are_in_the_last_place(mode):
    arguments = {"ponder__latent_steps": 0} if mode == "vanilla" else {}
    got = tally(small_model(ponder__mode=mode, **arguments), each_step=True)
    assert got.steps == ([51] if mode == "vanilla" else [0, 0, 51])
    assert (got.penalty, got.entropy, sum(got.weights), sum(got.own_losses)) == (0, 0, 0, 0)
