"""What each layer of a transformer does on some batches: attention entropy, gradients, movement of its features.

Works on any module tree whose attention is `torch.nn.functional.scaled_dot_product_attention`, ours and that of
`transformers`. Nothing of the model changes: hooks come off, `.grad` stays as it was, no graph outlives its batch.

Chapter: inflection
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from p2k.core.errors import P2KError
from p2k.linalg.cka import delta_cka
from p2k.ops.attention_entropy import attention_entropy

Batch = tuple[object, Tensor]
Predict = Callable[[nn.Module, object], Tensor]


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """Measurements of every layer over all batches; norms are those of the mean loss's gradient, in float64.

    Args:
        entropy: mean entropy of the attention rows in nats, ``[layers, heads]``; see `mean_entropy`.
        relative_entropy: the same divided by the logarithm of the number of visible keys, ``[layers, heads]``.
        batch_gradient: norm of the loss gradient in each layer's output, mean over batches, ``[layers]``.
        sample_gradient: norm of each example's own loss gradient in each layer's output, ``[layers, examples]``.
        parameter_gradient: norm of the gradient of a layer's trainable parameters, mean over batches, ``[layers]``.
        correct: which examples are classified correctly, ``[examples]``.
        doubt: probability of all wrong classes together, ``[examples]``.
    """

    entropy: Float[Tensor, "layers heads"]
    relative_entropy: Float[Tensor, "layers heads"]
    batch_gradient: Float[Tensor, " layers"]
    sample_gradient: Float[Tensor, "layers examples"]
    parameter_gradient: Float[Tensor, " layers"]
    correct: Bool[Tensor, " examples"]
    doubt: Float[Tensor, " examples"]

    @property
    def mean_entropy(self) -> Float[Tensor, " layers"]:
        """Over heads."""
        return self.entropy.mean(1)

    @property
    def median_gradient(self) -> Float[Tensor, " layers"]:
        """Norm of the typical example: the mean is ruled by the few that are confidently wrong."""
        return self.sample_gradient.median(1).values

    @property
    def mean_gradient(self) -> Float[Tensor, " layers"]:
        """Mean norm over examples."""
        return self.sample_gradient.mean(1)

    @property
    def share_of_wrong(self) -> Float[Tensor, " layers"]:
        """Part of the summed norms that belongs to wrongly classified examples."""
        return self.sample_gradient[:, ~self.correct].sum(1) / self.sample_gradient.sum(1)


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The longest `nn.ModuleList` of the model.

    Raises:
        ValueError: there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"transformer_layers: {type(model).__name__} has no nn.ModuleList; name its layers yourself")
    return list(max(lists, key=len))


def profile_layers(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    layers: Sequence[nn.Module] | None = None,
    predict: Predict = lambda model, inputs: model(inputs),
    valid: Callable[[object], Bool[Tensor, "batch tokens"]] | None = None,
) -> LayerProfile:
    """Measure a classifier layer by layer, in eval mode, batch by batch.

    Args:
        model: any module tree; frozen parameters are fine.
        batches: (inputs, labels) pairs, labels ``[batch]`` int64.
        layers: the modules to measure, in forward order; None takes `transformer_layers`.
        predict: returns logits ``[batch, classes]`` of the inputs.
        valid: tells which tokens of the inputs are no padding; padded queries do not count towards the entropy.

    Raises:
        ValueError: no batch, or the model has no list of layers.
        P2KError: a layer did not run exactly once, or ran no scaled dot-product attention.

    Source: wang2025inflection, eq:inflection-propagation.
    Chapter: inflection
    """
    layers = transformer_layers(model) if layers is None else list(layers)
    training = model.training
    model.eval()
    recorder = _Recorder(layers)
    try:
        with recorder.hooked(), torch.enable_grad():
            for inputs, labels in batches:
                recorder.measure(lambda inputs=inputs: predict(model, inputs), labels, valid and valid(inputs))
    finally:
        model.train(training)
    return recorder.summary()


@torch.no_grad()
def pooled_features(
    model: nn.Module,
    inputs: Iterable[object],
    *,
    layers: Sequence[nn.Module] | None = None,
    predict: Predict = lambda model, inputs: model(inputs),
) -> Float[Tensor, "layers examples width"]:
    """Output of every layer, averaged over tokens, in float64 on the CPU; the model is in eval mode meanwhile."""
    layers = transformer_layers(model) if layers is None else list(layers)
    found: list[list[Tensor]] = [[] for _ in layers]
    training = model.training
    model.eval()
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, training)
        for store, layer in zip(found, layers, strict=True):
            keep = lambda module, args, out, store=store: store.append(_tensor(out).double().mean(-2).cpu())  # noqa: E731
            stack.callback(layer.register_forward_hook(keep).remove)
        for batch in inputs:
            predict(model, batch)
    return torch.stack([torch.cat(parts) for parts in found])


def layer_movement(
    before: Float[Tensor, "layers examples width"],
    after: Float[Tensor, "layers examples width"],
    *,
    components: int = 64,
) -> Float[Tensor, " layers"]:
    """1 - CKA of each layer's features before and after a change, in a principal basis shared by both.

    Source: wang2025inflection, eq:inflection-delta-cka.
    Chapter: inflection
    """
    moved = [delta_cka(x, y, components=components)[0] for x, y in zip(before, after, strict=True)]
    return torch.tensor(moved, dtype=torch.float64)


class _Recorder(TorchFunctionMode):
    """Hooks on the layers, and attention replaced by attention that returns its entropy."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = layers
        self.running: int | None = None
        self.entropies: list[list[Tensor]] = [[] for _ in layers]
        self.relative: list[list[Tensor]] = [[] for _ in layers]
        self.rows: dict[str, list[Tensor]] = {"batch": [], "sample": [], "parameter": [], "correct": [], "doubt": []}
        self.norms: dict[int, Tensor] = {}
        self.source: Tensor | None = None
        self.valid: Tensor | None = None

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                before = lambda module, args, kwargs, number=number: self._enter(number, args, kwargs)  # noqa: E731
                after = lambda module, args, out, number=number: self._leave(number, out)  # noqa: E731
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after).remove)
            yield

    def measure(self, predict: Callable[[], Tensor], labels: Tensor, valid: Tensor | None) -> None:
        """One forward and one backward pass; the graph dies with it."""
        self.norms, self.source, self.valid = {}, None, valid
        with self:
            logits = predict()
        for number, found in enumerate(self.entropies):
            if len(found) != 1 + len(self.rows["batch"]) or self.source is None:
                raise P2KError(
                    f"layer {number} ({type(self.layers[number]).__name__}) must run one scaled_dot_product_attention "
                    f"per pass, it ran {len(found) - len(self.rows['batch'])}; for transformers choose "
                    "attn_implementation='sdpa'"
                )
        owned = [[p for p in layer.parameters() if p.requires_grad] for layer in self.layers]
        flat = [p for group in owned for p in group]
        gradients = iter(
            torch.autograd.grad(F.cross_entropy(logits, labels), [self.source, *flat], allow_unused=True)[1:]
        )
        norms = [_norm([g for _, g in zip(group, gradients, strict=False) if g is not None]) for group in owned]
        per_sample = torch.stack([self.norms[number] for number in range(len(self.layers))]).cpu()
        self.rows["batch"].append(per_sample.norm(dim=1))
        # The mean loss divides each example's gradient by their number.
        self.rows["sample"].append(per_sample * len(labels))
        self.rows["parameter"].append(torch.stack(norms))
        probabilities = logits.detach().double().softmax(-1)
        self.rows["doubt"].append(1 - probabilities.gather(1, labels[:, None]).squeeze(1).cpu())
        self.rows["correct"].append((logits.argmax(-1) == labels).cpu())

    def summary(self) -> LayerProfile:
        rows = self.rows
        if not rows["batch"]:
            raise ValueError("profile_layers: there is no batch to measure")
        entropy, relative = (torch.stack([_mean(x) for x in kind]) for kind in (self.entropies, self.relative))
        return LayerProfile(
            entropy=entropy,
            relative_entropy=relative,
            batch_gradient=torch.stack(rows["batch"]).mean(0),
            sample_gradient=torch.cat(rows["sample"], dim=1),
            parameter_gradient=torch.stack(rows["parameter"]).mean(0),
            correct=torch.cat(rows["correct"]),
            doubt=torch.cat(rows["doubt"]),
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention or self.running is None:
            return func(*args, **(kwargs or {}))
        out, entropy = attention_entropy(*args, **(kwargs or {}))
        self._record(entropy.detach(), _visible_keys(*args, **(kwargs or {})))
        return out

    def _record(self, entropy: Tensor, visible: Tensor) -> None:
        """Sums over the valid rows of a batch, per head, with the number of rows last."""
        rows = torch.ones_like(entropy) if self.valid is None else self.valid[:, None].expand_as(entropy).to(entropy)
        limit = visible.to(entropy).log()
        share = torch.where(limit > 0, entropy / torch.where(limit > 0, limit, 1.0), 0.0)
        count = rows.double().sum((0, 2))
        for store, values in ((self.entropies, entropy), (self.relative, share)):
            store[self.running].append(torch.stack([(values * rows).double().sum((0, 2)), count]).cpu())

    def _enter(self, number: int, args: tuple, kwargs: dict):
        self.running = number
        if number:
            return None
        # With everything below frozen autograd would stop here and leave the profile incomplete.
        given = args[0] if args else kwargs["hidden_states"]
        self.source = given if given.requires_grad else given.detach().requires_grad_()
        return ((self.source, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.source})

    def _leave(self, number: int, out: object) -> None:
        self.running = None
        store = lambda gradient: self.norms.__setitem__(number, gradient.detach().double().flatten(1).norm(dim=1))  # noqa: E731
        _tensor(out).register_hook(store)


def _visible_keys(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest, **options) -> Tensor:
    """How many keys each query may look at, broadcastable to [batch, heads, queries]."""
    mask, causal = options.get("attn_mask", attn_mask), options.get("is_causal", rest[1] if len(rest) > 1 else False)
    if causal:
        return torch.arange(1, q.shape[2] + 1, device=q.device).clamp_max(k.shape[2])
    if mask is None:
        return torch.tensor(k.shape[2], device=q.device)
    # The lowest finite number is a library's way to write minus infinity.
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return seen.expand(*seen.shape[:-1], k.shape[2]).sum(-1)


def _tensor(out: object) -> Tensor:
    """A layer's hidden states, alone or first of several outputs."""
    return out if isinstance(out, Tensor) else out[0]


def _mean(parts: list[Tensor]) -> Tensor:
    total = torch.stack(parts).sum(0)
    return total[0] / total[1]


def _norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients of a layer together; 0 for a frozen layer."""
    squares = [g.detach().double().square().sum().cpu() for g in gradients]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)
