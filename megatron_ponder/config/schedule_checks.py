"""Checks that the schedules of a run can be what they say."""

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.run import IN_PLACE, OptimizerConfig, TrainingConfig
from megatron_ponder.config.sections import Config

MOST_INCREMENTS = 1000  # of a ramp, each of whose sizes the ranks have to be able to share


def validate_schedules(config: Config) -> None:
    """Refuse a schedule that contradicts itself or the length of the run, saying what to write instead.

    Raises:
        UserError: for the first contradiction found.
    """
    _validate_numbers(config.optimizer)
    _validate_decay(config.optimizer)
    _validate_lengths(config)
    _validate_ramp(config.training)
    _validate_penalty(config)
    _validate_prior(config)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _validate_numbers(optimizer: OptimizerConfig) -> None:
    for share, number in IN_PLACE.items():
        _require(
            (getattr(optimizer, share), getattr(optimizer, number)) != (None, None),
            f"optimizer.{share} and optimizer.{number} are both null; give one of them",
        )
    lowest = optimizer.min_learning_rate
    _require(
        lowest is None or lowest <= optimizer.learning_rate,
        f"optimizer.min_learning_rate {lowest} lies above the peak, optimizer.learning_rate {optimizer.learning_rate}; "
        "lower it",
    )


def _validate_decay(optimizer: OptimizerConfig) -> None:
    decays = optimizer.schedule == "wsd"
    for name in ("decay_steps", "decay_shape"):
        value = getattr(optimizer, name)
        _require(
            decays or value is None,
            f"optimizer.{name} {value} has no meaning with optimizer.schedule {optimizer.schedule}; leave it out, or "
            "set optimizer.schedule to wsd",
        )
    _require(
        not decays or optimizer.decay_steps is not None,
        "optimizer.schedule wsd needs optimizer.decay_steps, the steps at the end of the run in which the learning "
        "rate falls; a tenth of training.steps is usual, and 0 a run that another one goes on from",
    )


def _validate_lengths(config: Config) -> None:
    optimizer, steps = config.optimizer, config.training.steps
    warmup, decay = optimizer.warmup(steps), optimizer.decay_steps or 0
    _require(
        warmup <= steps,
        f"optimizer.warmup_steps {warmup} is more than training.steps {steps}; make it a part of them",
    )
    _require(
        decay <= steps,
        f"optimizer.decay_steps {decay} is more than training.steps {steps}; make it a part of them",
    )
    _require(
        warmup + decay <= steps,
        f"optimizer.decay_steps {decay} and {warmup} steps of warm-up are more than training.steps {steps}; "
        "shorten one of them",
    )
    _require(
        optimizer.schedule != "inverse_sqrt" or warmup > 0,
        "optimizer.schedule inverse_sqrt falls by the length of its warm-up, and this one has none; set "
        "optimizer.warmup_steps",
    )


def _validate_ramp(training: TrainingConfig) -> None:
    ramp, full = training.batch_size_ramp, training.global_batch_size
    if ramp is None:
        return
    _require(
        ramp.start < full,
        f"training.batch_size_ramp starts with {ramp.start} sequences, and training.global_batch_size is {full}; start "
        "with fewer, or leave training.batch_size_ramp out",
    )
    _require(
        (full - ramp.start) % ramp.increment == 0,
        f"training.batch_size_ramp goes from {ramp.start} to training.global_batch_size {full}, which is no whole "
        f"number of increments of {ramp.increment}; choose a divisor of {full - ramp.start}",
    )
    increments = (full - ramp.start) // ramp.increment
    _require(
        increments <= MOST_INCREMENTS,
        f"training.batch_size_ramp has {increments:,} increments, and at most {MOST_INCREMENTS:,} are looked at; "
        "choose a larger one",
    )


def _validate_penalty(config: Config) -> None:
    ponder, training = config.ponder, config.ponder_training
    _require(
        training.penalty_start <= training.penalty_end,
        f"ponder_training.penalty_start {training.penalty_start} must lie between 0 and ponder_training.penalty_end "
        f"{training.penalty_end}",
    )
    target = training.target_latent_steps
    _require(
        target is None or (target < ponder.latent_steps and training.penalty_weight > 0),
        f"ponder_training.target_latent_steps {target} must lie between 0 and ponder.latent_steps "
        f"{ponder.latent_steps}, and needs a ponder_training.penalty_weight above 0 to begin with, such as 0.01",
    )


def _validate_prior(config: Config) -> None:
    ponder, training = config.ponder, config.ponder_training
    prior, choices = training.penalty_prior, ponder.latent_steps + 1
    _require(
        training.penalty == "token" or (prior is not None and training.penalty_weight > 0),
        "ponder_training.penalty batch needs a penalty_prior, such as the rate 0.5, and a penalty_weight, such as 1",
    )
    _require(
        training.penalty == "batch" or prior is None,
        f"ponder_training.penalty_prior {prior} is for ponder_training.penalty batch; set that, or leave it out",
    )
    _require(
        training.penalty == "token" or training.target_latent_steps is None,
        "ponder_training.penalty batch leads to the steps of its prior; leave ponder_training.target_latent_steps out",
    )
    fits = not isinstance(prior, list) or (len(prior) == choices and abs(sum(prior) - 1) < 1e-3)
    _require(
        fits or ponder.mode != "adaptive",
        f"ponder_training.penalty_prior {prior} must be {choices} shares that sum to 1, of tokens by latent steps",
    )
