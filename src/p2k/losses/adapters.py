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
AGGREGATION_OF_LOSS_TYPE = {"grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}
AGGREGATION_OF_LOSS_TYPE |= dict.fromkeys(("bnpo", "dapo"), "token-mean")
# Terms of TRL's own loss method that a loss of the contract does not have.
TRL_OFF = {"beta": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None}
TRL_OFF |= dict.fromkeys(("aux_loss_enabled", "_entropy_bonus_enabled", "_is_vlm"), False)


def register_with_verl(options: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """Enter the policy losses and advantage estimators that verl lacks in its registries, and return their names.

    Call it in each worker, from the module that ``model.external_lib`` names. The losses are of groups of samples,
    and verl does not tell them which: keep the rows of a prompt together (``trainer.balance_batch=False``,
    ``actor.shuffle=False``, micro-batches of whole groups) and set ``actor.loss_agg_mode=seq-mean-token-mean``.

    Args:
        options: options by name of the loss, such as ``{"gopo": {"mu": 0.3}}``; `num_generations` is the actor's
            `rollout_n` unless given here.

    Raises:
        MissingDependency: verl cannot be imported.
        ValueError: options for a loss that is not entered. A loss itself raises for batches of dynamic size, another
            aggregation, and as documented there.
    """
    verl = require("verl.trainer.ppo.core_algos", extra="trainers", purpose="register_with_verl")
    losses = [name for name in POLICY_LOSSES if name not in verl.POLICY_LOSS_REGISTRY]
    estimators = [name for name in ADVANTAGE_ESTIMATORS if name not in verl.ADV_ESTIMATOR_REGISTRY]
    if unknown := sorted(set(options or {}) - set(losses)):
        raise ValueError(f"register_with_verl: expected options for {losses}, the losses to enter, got {unknown}")
    for name in losses:
        verl.register_policy_loss(name)(_for_verl(name, POLICY_LOSSES[name], (options or {}).get(name, {})))
    for name in estimators:
        verl.register_adv_est(name)(ADVANTAGE_ESTIMATORS[name])
    return losses + estimators


def _for_verl(name: str, function: PolicyLoss, options: Mapping[str, Any]) -> Callable:
    """The loss with its share of verl's global batch, over which verl sums, and metrics as numbers."""

    def loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights=None):
        if config.use_dynamic_bsz or loss_agg_mode != "seq-mean-token-mean":
            found = f"{config.use_dynamic_bsz} and {loss_agg_mode}"
            raise ValueError(f"{name}: set use_dynamic_bsz=False and loss_agg_mode=seq-mean-token-mean, got {found}")
        group = {"num_generations": config.rollout_n} if name in GROUP_LOSSES else {}
        how = (loss_agg_mode, {**group, **options}, rollout_is_weights)
        value, metrics = function(old_log_prob, log_prob, advantages, response_mask, *how)
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
        ValueError: an unknown loss. The trainer raises when made with a setting that the loss does not honour (a KL
            or entropy term, images, another ratio level or aggregation) or, for a loss per group, more than 1
            `steps_per_generation`: TRL shuffles its samples, and only the whole batch can be put in order.
    """
    function = get_policy_loss(loss_name)
    trl = require("trl", extra="trainers", purpose="policy_loss_trainer")

    class PolicyLossTrainer(trl.GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _check_settings(self, loss_name)

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            order = torch.arange(len(batch["completion_ids"]), device=batch["completion_ids"].device)
            return {**batch, "sample_order": order}

        def _compute_loss(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> Tensor:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            new, _, _ = self._get_per_token_logps_and_entropies(model, tokens, seen, mask.shape[1])
            old = inputs.get("old_per_token_logps", new.detach()).to(new.dtype)
            advantages = inputs["advantages"].view(len(new), -1).to(new.dtype).expand_as(new)
            weights = inputs.get("importance_sampling_ratio")
            weights = None if weights is None else weights.expand_as(new)
            batch = (old, new, advantages, mask)
            if loss_name in GROUP_LOSSES and "sample_order" in inputs:
                batch = tuple(tensor[inputs["sample_order"].argsort()] for tensor in batch)
            given = {**_settled(self, inputs, loss_name), **options}
            loss, metrics = function(*batch, AGGREGATION_OF_LOSS_TYPE[self.loss_type], given, weights)
            mode = "train" if self.model.training else "eval"
            for key, value in metrics.items():
                self._metrics[mode][key].append(self.accelerator.gather(value).mean().item())
            whole = mode == "eval" or self.loss_type == "dapo"
            return loss if whole else loss / self.current_gradient_accumulation_steps

    return PolicyLossTrainer


def _check_settings(trainer: Any, name: str) -> None:
    wanted = {key: (value,) for key, value in TRL_OFF.items()}
    wanted["importance_sampling_level"] = ("sequence",) if name == "gspo" else ("token",)
    wanted["loss_type"] = ("grpo",) if name in (*GROUP_LOSSES, "gspo") else tuple(AGGREGATION_OF_LOSS_TYPE)
    if name != "vanilla":
        wanted["delta"] = (None,)
    if name in GROUP_LOSSES:
        wanted["steps_per_generation"] = (1,)
    for key, allowed in wanted.items():
        found = getattr(trainer, key, getattr(trainer.args, key, None))
        if found not in allowed:
            raise ValueError(f"policy_loss_trainer: {name} needs {key} in {allowed}, got {found!r}")


def _settled(trainer: Any, inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options that TRL's configuration settles, as TRL's own losses read them."""
    train, found = trainer.model.training, {}
    if name in GROUP_LOSSES:
        return {"num_generations": trainer.num_generations if train else trainer.num_generations_eval}
    if name in ("vanilla", "gspo"):
        found |= {"clip_ratio_low": trainer.epsilon_low, "clip_ratio_high": trainer.epsilon_high}
    if name == "vanilla":
        found["clip_ratio_c"] = trainer.args.delta
    if trainer.loss_type == "dr_grpo":
        found["loss_scale_factor"] = len(inputs["completion_mask"]) * trainer.max_completion_length
    if trainer.loss_type == "dapo":
        parts = trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation if train else 1.0
        found["num_items_in_batch"] = inputs["num_items_in_batch"].clamp(1) * parts / trainer.accelerator.num_processes
    return found
