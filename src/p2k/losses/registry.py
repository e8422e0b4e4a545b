"""Registries on verl's contract: policy losses and advantage estimators by name, and how they read their options."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

PolicyLoss = Callable[..., tuple]
AdvantageEstimator = Callable[..., tuple]
POLICY_LOSSES: dict[str, PolicyLoss] = {}
ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {}


def _enter(table: dict[str, Callable], kind: str, name: str) -> Callable[[Callable], Callable]:
    def enter(function: Callable) -> Callable:
        if table.get(name, function) is not function:
            raise ValueError(f"{kind}: {name!r} is taken")
        table[name] = function
        return function

    return enter


def register_policy_loss(name: str) -> Callable[[PolicyLoss], PolicyLoss]:
    """Decorate ``fn(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)``.

    It returns ``(loss, metrics)``.

    Raises:
        ValueError: another function has the name.
    """
    return _enter(POLICY_LOSSES, "register_policy_loss", name)


def register_adv_est(name: str) -> Callable[[AdvantageEstimator], AdvantageEstimator]:
    """Decorate ``fn(token_level_rewards, response_mask, *, index, config, ...)``.

    It returns ``(advantages, returns)``.

    Raises:
        ValueError: another function has the name.
    """
    return _enter(ADVANTAGE_ESTIMATORS, "register_adv_est", name)


def get_policy_loss(name: str) -> PolicyLoss:
    """Look a policy loss up.

    Raises:
        ValueError: no such loss; the message lists those there are.
    """
    if name not in POLICY_LOSSES:
        raise ValueError(f"get_policy_loss: expected one of {', '.join(sorted(POLICY_LOSSES))}, got {name!r}")
    return POLICY_LOSSES[name]


def get_adv_estimator(name: str) -> AdvantageEstimator:
    """Look an advantage estimator up.

    Raises:
        ValueError: no such estimator; the message lists those there are.
    """
    if name not in ADVANTAGE_ESTIMATORS:
        known = ", ".join(sorted(ADVANTAGE_ESTIMATORS))
        raise ValueError(f"get_adv_estimator: expected one of {known}, got {name!r}")
    return ADVANTAGE_ESTIMATORS[name]


def read_options(op: str, config: object, **defaults: Any) -> SimpleNamespace:
    """Take the named options from a config.

    A plain dict holds the options of one loss, so a name the loss does not know raises. Any other object is a
    trainer's configuration with room for more: its attributes are read, those of its `policy_loss` first.

    Raises:
        ValueError: a dict with an unknown name.
    """
    if config is None:
        return SimpleNamespace(**defaults)
    if type(config) is dict:
        unknown = sorted(set(config) - set(defaults))
        if unknown:
            raise ValueError(f"{op}: unknown options {', '.join(unknown)}: supported are {', '.join(defaults)}")
        return SimpleNamespace(**{**defaults, **config})
    found = dict(defaults)
    for source in (config, getattr(config, "policy_loss", None)):
        for name in defaults:
            value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            if value is not None:
                found[name] = value
    return SimpleNamespace(**found)
