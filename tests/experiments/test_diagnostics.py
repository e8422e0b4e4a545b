"""Diagnostics on models whose entropy, gradients and movement are known."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.experiments.diagnostics import layer_movement, pooled_features, profile_layers, transformer_layers
from p2k.models.gpt import GPT, GPTConfig
from p2k.models.vit import DIGITS, build_vit


def random(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


class Layer(nn.Module):
    """Attention with fixed scores: query i prefers key i by `margin`, and the values pass through a gain."""

    def __init__(self, margin, gain):
        super().__init__()
        self.margin, self.gain = margin, nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x):
        eye = torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), 1, -1, -1)
        out = F.scaled_dot_product_attention(self.margin * eye, eye, x.unsqueeze(1), scale=1.0)
        return self.gain * out.squeeze(1)


class Known(nn.Module):
    def __init__(self, margins=(0.0, 2.0, 50.0), gains=(3.0, 0.5, 2.0)):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, margins, gains))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum(1)


def batches(count=3, size=4, tokens=5, classes=3):
    labels = torch.arange(size) % classes
    return [(random(size, tokens, classes, seed=seed), labels) for seed in range(count)]


def test_entropy_and_gradients_in_closed_form():
    model = Known()
    profile = profile_layers(model, batches())
    for layer, entropy in zip(model.layers, profile.mean_entropy, strict=True):
        weights = torch.softmax(layer.margin * torch.eye(5, dtype=torch.float64), -1)[0]
        assert abs(entropy - torch.special.entr(weights).sum()) < 1e-12
    assert abs(profile.relative_entropy[0, 0] - 1) < 1e-12
    assert profile.relative_entropy[2, 0] < 1e-12
    # Symmetric attention with row sums one leaves token-constant gradients alone: g = (p - e) times the gains above.
    doubt, norms, parameter = [], [], []
    inverse_gains = 3 / torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)
    for x, labels in batches():
        logits = model(x)
        p = logits.softmax(-1).detach()
        error = (p - F.one_hot(labels, 3)).norm(dim=1)
        norms.append(torch.stack([error * gain * math.sqrt(5) for gain in (1.0, 2.0, 1.0)]))
        doubt.append(1 - p.gather(1, labels[:, None]).squeeze(1))
        parameter.append(((p - F.one_hot(labels, 3)) * logits.detach() / 3).sum() / 4 * inverse_gains)
    norms = torch.cat(norms, 1)
    # g in layer l's output: product of the gains of the layers above, 0.5 * 2, then 2, then 1.
    assert (profile.sample_gradient - norms).abs().max() < 1e-12
    assert (profile.doubt - torch.cat(doubt)).abs().max() < 1e-12
    expected = norms.view(3, 3, 4).square().sum(2).sqrt().mean(1) / 4
    assert (profile.batch_gradient - expected).abs().max() < 1e-12
    # d loss / d gain_l = <p - e, logits> / gain_l / batch.
    exact = torch.stack([p.abs() for p in parameter]).mean(0)
    assert (profile.parameter_gradient - exact).abs().max() < 1e-12


def test_summaries():
    profile = profile_layers(Known(), batches())
    wrong = ~profile.correct
    assert wrong.any()
    assert profile.correct.any()
    share = profile.sample_gradient[:, wrong].sum(1) / profile.sample_gradient.sum(1)
    assert torch.equal(profile.share_of_wrong, share)
    assert torch.equal(profile.median_gradient, profile.sample_gradient.median(1).values)
    assert (profile.mean_gradient - profile.sample_gradient.mean(1)).abs().max() == 0


def test_the_model_is_left_as_it_was():
    model = Known().train()
    model.layers[0].gain.grad = torch.tensor(7.0, dtype=torch.float64)
    profile_layers(model, batches())
    assert model.training
    assert model.layers[0].gain.grad == 7
    assert model.layers[1].gain.grad is None
    hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(hooks)
    with pytest.raises(ZeroDivisionError):
        profile_layers(model, batches(), predict=lambda model, inputs: model(inputs) / (1 // 0))
    hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(hooks)
    assert model.training


def test_no_graph_outlives_its_batch():
    model, alive = Known(), []

    def stream():
        for x, labels in batches():
            gc.collect()
            assert not any(ref() is not None for ref in alive)
            yield x, labels

    def predict(model, inputs):
        logits = model(inputs)
        alive.append(weakref.ref(logits))
        return logits

    profile = profile_layers(model, stream(), predict=predict)
    assert len(alive) == 3
    assert not any(x.requires_grad for x in vars(profile).values())


def test_frozen_layers_still_show_their_gradients():
    model = build_vit(DIGITS, "gelu").double()
    images, labels = random(6, 1, 8, 8), torch.arange(6)
    free = profile_layers(model, [(images, labels)])
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    frozen = profile_layers(model, [(images, labels)])
    assert torch.equal(free.sample_gradient, frozen.sample_gradient)
    assert (frozen.parameter_gradient == 0).all()
    assert (free.parameter_gradient > 0).all()


def test_vit_gradients_are_those_of_autograd():
    model = build_vit(DIGITS, "gelu").double()
    images, labels = random(6, 1, 8, 8), torch.arange(6)
    profile = profile_layers(model, [(images, labels)])
    x, outputs = model.tokens(images), []
    for block in model.blocks:
        x = block(x)
        x.retain_grad()
        outputs.append(x)
    loss = F.cross_entropy(model.head(model.readout(outputs[-1], outputs[-2])), labels)
    loss.backward()
    for found, out in zip(profile.sample_gradient, outputs, strict=True):
        assert (found - 6 * out.grad.flatten(1).norm(dim=1)).abs().max() < 1e-12
    for found, block in zip(profile.parameter_gradient, model.blocks, strict=True):
        assert abs(found - torch.cat([p.grad.flatten() for p in block.parameters()]).norm()) < 1e-12
    assert profile.entropy.shape == (DIGITS.depth, DIGITS.heads)


def test_gradients_scale_with_the_loss():
    half, whole = (profile_layers(Known(gains=(1.0, 1.0, g)), batches(1)) for g in (1e-9, 1.0))
    # At vanishing logits p is uniform, so that only the gain of the last layer is left: linear in it.
    assert (half.sample_gradient[:2] / 1e-9 - half.sample_gradient[2]).abs().max() < 1e-8
    assert whole.sample_gradient.shape == half.sample_gradient.shape


def test_gpt_with_a_causal_mask():
    model = GPT(GPTConfig(vocab_size=11, context=9, dim=16, depth=3, heads=2)).double()
    tokens, labels = torch.randint(0, 11, (5, 9), generator=generator(0)), torch.arange(5)
    last = lambda model, tokens: model(tokens)[:, -1]  # noqa: E731
    profile = profile_layers(model, [(tokens, labels)], predict=last)
    assert profile.entropy.shape == (3, 2)
    # Untrained attention is nearly uniform over the keys 0..i that query i sees: mean of log 1 to log 9.
    uniform = torch.arange(1, 10).double().log().mean()
    assert ((profile.entropy > 0.98 * uniform) & (profile.entropy <= uniform)).all()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(_hidden(out)))
    loss = F.cross_entropy(last(model, tokens), labels)
    for found, exact in zip(profile.sample_gradient, torch.autograd.grad(loss, outputs), strict=True):
        assert (found - 5 * exact.flatten(1).norm(dim=1)).abs().max() < 1e-12


def _hidden(out):
    return out if isinstance(out, torch.Tensor) else out[0]


def test_the_split_into_batches_changes_no_example():
    images, labels = random(12, 1, 8, 8), torch.arange(12) % 10
    model = build_vit(DIGITS, "gelu").double()
    whole = profile_layers(model, [(images, labels)])
    parts = profile_layers(model, list(zip(images.split(5), labels.split(5), strict=True)))
    assert (whole.sample_gradient - parts.sample_gradient).abs().max() < 1e-12
    assert (whole.entropy - parts.entropy).abs().max() < 1e-12
    assert torch.equal(whole.correct, parts.correct)


def test_bert_of_transformers_with_padding():
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24, num_labels=2
    )
    config._attn_implementation = "sdpa"
    model = transformers.BertForSequenceClassification(config)
    ids = torch.randint(0, 30, (4, 9), generator=generator(0))
    kept = torch.arange(9) < torch.tensor([9, 6, 4, 9])[:, None]

    def predict(model, inputs):
        return model(input_ids=inputs[0], attention_mask=inputs[1].long()).logits

    profile = profile_layers(model, [((ids, kept), torch.tensor([0, 1, 0, 1]))], predict=predict, valid=lambda x: x[1])
    assert profile.entropy.shape == (3, 4)
    # Untrained attention is nearly uniform over the keys that are no padding.
    assert (profile.relative_entropy > 0.99).all()
    assert (profile.relative_entropy <= 1 + 1e-6).all()
    single = profile_layers(model, [((ids[1:2, :6], kept[1:2, :6]), torch.tensor([1]))], predict=predict)
    padded = profile_layers(model, [((ids[1:2], kept[1:2]), torch.tensor([1]))], predict=predict, valid=lambda x: x[1])
    # Float32 sums of a padded and a cut sequence.
    assert (single.entropy - padded.entropy).abs().max() < 1e-5
    eager = transformers.BertForSequenceClassification._from_config(config, attn_implementation="eager")
    with pytest.raises(P2KError, match="attn_implementation='sdpa'"):
        profile_layers(eager, [((ids, kept), torch.tensor([0, 1, 0, 1]))], predict=predict)


def test_movement():
    model = Known(gains=(1.0, 1.0, 1.0))
    inputs = [x for x, _ in batches()]
    before = pooled_features(model, inputs)
    assert before.shape == (3, 12, 3)
    assert (before[0] - torch.cat(inputs).mean(1)).abs().max() < 1e-12
    # A gain scales features, which linear CKA does not see; a shear it does.
    model.layers[1].gain.data.mul_(5)
    assert layer_movement(before, pooled_features(model, inputs), components=3).abs().max() < 1e-10
    shear = torch.eye(3, dtype=torch.float64)
    shear[0, 1] = 3
    moved = layer_movement(before, torch.stack([before[0], before[1] @ shear, before[2]]), components=3)
    assert moved[1] > 0.05
    assert moved[[0, 2]].abs().max() < 1e-10


def test_bad_input():
    with pytest.raises(ValueError, match="no batch"):
        profile_layers(Known(), [])
    with pytest.raises(ValueError, match="has no nn.ModuleList"):
        transformer_layers(nn.Linear(2, 2))
    model = Known()
    with pytest.raises(P2KError, match="must run one scaled_dot_product_attention"):
        profile_layers(model, batches(), layers=[*model.layers, nn.Identity()])
