"""The losses inside other trainers: entered in verl's registries, and as a subclass of TRL's GRPO trainer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from p2k.core.checks import require
from p2k.losses import recipes  # noqa: F401  (fills the registries)
from p2k.losses.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, PolicyLoss, get_policy_loss

GROUP_LOSSES = ("adpo", "apo", "gopo", "online_dpo")
# TRL names a mean by the method that introduced it.
AGGREGATION_OF_LOSS_TYPE = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
}
# What TRL's own loss method would do with these settings is nothing that a loss of the contract does.
TRL_DEFAULTS = {"beta": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "aux_loss_enabled": False}
IMAGE_INPUTS = ("pixel_values", "token_type_ids", "mm_token_type_ids", "image_position_ids")


def register_with_verl(options: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """Enter every policy loss and advantage estimator that verl does not have in verl's registries, under our names.

    Call it in each worker, from the module that ``model.external_lib`` names. The losses are of groups of samples:
    keep the rows of a prompt together (``trainer.balance_batch=False``, ``actor.shuffle=False``, micro-batches of
    whole groups) and set ``actor.loss_agg_mode=seq-mean-token-mean``.

    Args:
        options: options by name of the loss, such as ``{"gopo": {"mu": 0.3}}``; `num_generations` is the actor's
            `rollout_n` unless given here.

    Returns:
        The names entered; none on a second call.

    Raises:
        MissingDependency: verl cannot be imported.
        ValueError: options for a loss that is not entered. A loss itself raises for batches of dynamic size, another
            aggregation, and as documented there.
    """
    verl = require("verl.trainer.ppo.core_algos", extra="trainers", purpose="register_with_verl")
    losses = [name for name in POLICY_LOSSES if name not in verl.POLICY_LOSS_REGISTRY]
    estimators = [name for name in ADVANTAGE_ESTIMATORS if name not in verl.ADV_ESTIMATOR_REGISTRY]
    chosen = options or {}
    if unknown := sorted(set(chosen) - set(losses)):
        raise ValueError(f"register_with_verl: expected options for {losses}, the losses to enter, got {unknown}")
    for name in losses:
        verl.register_policy_loss(name)(_for_verl(name, POLICY_LOSSES[name], chosen.get(name, {})))
    for name in estimators:
        verl.register_adv_est(name)(ADVANTAGE_ESTIMATORS[name])
    return losses + estimators


def _for_verl(name: str, function: PolicyLoss, options: Mapping[str, Any]) -> Callable:
    """The loss with its share of verl's global batch, over which verl sums, and metrics as numbers."""

    def loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights=None):
        if getattr(config, "use_dynamic_bsz", False) or loss_agg_mode != "seq-mean-token-mean":
            raise ValueError(
                f"{name}: verl must set use_dynamic_bsz=False and loss_agg_mode=seq-mean-token-mean, "
                f"got {getattr(config, 'use_dynamic_bsz', False)} and {loss_agg_mode}"
            )
        group = {"num_generations": config.rollout_n} if name in GROUP_LOSSES else {}
        batch = (old_log_prob, log_prob, advantages, response_mask)
        value, metrics = function(*batch, loss_agg_mode, {**group, **options}, rollout_is_weights)
        whole = getattr(config, "global_batch_info", {})
        if whole.get("global_batch_size"):
            value = value * (log_prob.shape[0] * whole.get("dp_size", 1) / whole["global_batch_size"])
        return value, {key: metric.item() for key, metric in metrics.items()}

    return loss


def policy_loss_trainer(loss_name: str, **options: Any) -> type:
    """Subclass ``trl.GRPOTrainer`` so that its loss is one of our policy losses.

    The trainer's configuration says the rest: `loss_type` the aggregation (grpo, bnpo, dapo or dr_grpo), `epsilon`,
    `epsilon_high` and `delta` the clip, `num_generations` the group, `scale_rewards` the advantages. Metrics are
    logged under the names of the loss.

    Args:
        loss_name: a policy loss of the registry.
        options: further options of that loss, which win over the configuration's.

    Raises:
        MissingDependency: TRL cannot be imported.
        ValueError: an unknown loss. The trainer raises when it is made with a setting that the loss does not honour
            (a KL or entropy term, another ratio level or aggregation) or, for a loss per group, with
            `steps_per_generation` above 1: TRL shuffles its samples, and only the whole batch can be put in order.
    """
    function = get_policy_loss(loss_name)
    trl = require("trl", extra="trainers", purpose="policy_loss_trainer")

    class PolicyLossTrainer(trl.GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _check_settings(self, loss_name)

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            rows = batch["completion_ids"]
            return {**batch, "sample_order": torch.arange(rows.shape[0], device=rows.device)}

        def _compute_loss(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> Tensor:
            return _trainer_loss(self, model, inputs, loss_name, function, options)

    return PolicyLossTrainer


def _check_settings(trainer: Any, name: str) -> None:
    args = trainer.args
    found = {key: getattr(trainer, key) for key in TRL_DEFAULTS}
    expected = {**TRL_DEFAULTS, "importance_sampling_level": "sequence" if name == "gspo" else "token"}
    found["importance_sampling_level"] = trainer.importance_sampling_level
    found["entropy bonus"], expected["entropy bonus"] = trainer._entropy_bonus_enabled, False
    if name != "vanilla":
        found["delta"], expected["delta"] = args.delta, None
    if name in GROUP_LOSSES:
        found["steps_per_generation"], expected["steps_per_generation"] = args.steps_per_generation, 1
    wrong = {key: value for key, value in found.items() if value != expected[key]}
    if wrong:
        wanted = {key: expected[key] for key in wrong}
        raise ValueError(f"policy_loss_trainer: {name} needs {wanted}, got {wrong}")
    allowed = ("grpo",) if name in (*GROUP_LOSSES, "gspo") else tuple(AGGREGATION_OF_LOSS_TYPE)
    if trainer.loss_type not in allowed:
        raise ValueError(f"policy_loss_trainer: {name} needs loss_type in {allowed}, got {trainer.loss_type!r}")


def _trainer_loss(
    trainer: Any, model: torch.nn.Module, inputs: Mapping[str, Any], name: str, function: PolicyLoss, options: dict
) -> Tensor:
    if images := [key for key in IMAGE_INPUTS if key in inputs]:
        raise ValueError(f"policy_loss_trainer: {name} takes text only, got {', '.join(images)}")
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    new, _, _ = trainer._get_per_token_logps_and_entropies(model, tokens, seen, mask.shape[1])
    old = inputs["old_per_token_logps"] if inputs.get("old_per_token_logps") is not None else new.detach()
    advantages = inputs["advantages"].view(new.shape[0], -1).to(new.dtype).expand_as(new)
    weights = inputs.get("importance_sampling_ratio")
    weights = None if weights is None else weights.expand_as(new)
    mode, mean = "train" if trainer.model.training else "eval", AGGREGATION_OF_LOSS_TYPE[trainer.loss_type]
    batch = (old.to(new.dtype), new, advantages, mask)
    if name in GROUP_LOSSES and "sample_order" in inputs:
        order = inputs["sample_order"].argsort()
        batch = tuple(tensor[order] for tensor in batch)
    given = {**_options(trainer, inputs, name, mode, len(new)), **options}
    loss, metrics = function(*batch, mean, given, weights)
    for key, value in metrics.items():
        trainer._metrics[mode][key].append(trainer.accelerator.gather(value).float().mean().item())
    parts = trainer.current_gradient_accumulation_steps if mode == "train" and trainer.loss_type != "dapo" else 1
    return loss / parts


def _options(trainer: Any, inputs: Mapping[str, Any], name: str, mode: str, rows: int) -> dict[str, Any]:
    """The options that TRL's configuration settles, as TRL's own losses read them."""
    if name in GROUP_LOSSES:
        return {"num_generations": trainer.num_generations if mode == "train" else trainer.num_generations_eval}
    found: dict[str, Any] = {}
    if name in ("vanilla", "gspo"):
        found |= {"clip_ratio_low": trainer.epsilon_low, "clip_ratio_high": trainer.epsilon_high}
    if name == "vanilla":
        found["clip_ratio_c"] = trainer.args.delta
    if trainer.loss_type == "dr_grpo":
        found["loss_scale_factor"] = rows * trainer.max_completion_length
    if trainer.loss_type == "dapo":
        window = trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
        items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        found["num_items_in_batch"] = items * window if mode == "train" else items
    return found
