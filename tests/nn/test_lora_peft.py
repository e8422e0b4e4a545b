"""Adapters of PEFT here and ours there: files, names, gradients, several in one model."""

import itertools

import peft
import pytest
import torch
from lora_cases import CONFIGS, FLOAT32, Model, inputs, randomised

from p2k.nn.lora import LoraConfig
from p2k.nn.lora_adapters import adapter_parameters, inject_adapter_in_model, load_adapter, save_adapter, set_adapter

each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each
def test_saved_adapters_load_in_peft(config, tmp_path):
    ours = inject_adapter_in_model(LoraConfig(**config), Model())
    randomised(adapter_parameters(ours).values())
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path)
    for model in (ours, theirs):
        model.eval()
    torch.testing.assert_close(ours(inputs(5)), theirs(inputs(5)), rtol=FLOAT32, atol=FLOAT32)
    assert ours(inputs(5)).sub(Model()(inputs(5))).abs().max() > 0.1


@each
def test_adapters_of_peft_load_here(config, tmp_path):
    theirs = peft.get_peft_model(Model(), peft.LoraConfig(**config))
    randomised(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(Model(), tmp_path)
    for model in (ours, theirs):
        model.eval()
    torch.testing.assert_close(ours(inputs(5)), theirs(inputs(5)), rtol=FLOAT32, atol=FLOAT32)
    assert not any(p.requires_grad for p in ours.parameters())
    trainable = load_adapter(Model(), tmp_path, is_trainable=True)
    count = sum(p.numel() for p in trainable.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


@each
def test_parameter_names_and_gradients_are_those_of_peft(config):
    ours = inject_adapter_in_model(LoraConfig(**config), Model())
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), Model())
    names = {name.replace("modules_to_save.default.", "modules_to_save.") for name, _ in ours.named_parameters()}
    assert names == {
        name.replace("modules_to_save.default.", "modules_to_save.") for name, _ in theirs.named_parameters()
    }
    for model in (ours, theirs):
        parameters = dict(model.named_parameters())
        randomised(parameters[name] for name in sorted(parameters) if "lora" in name)
        model(inputs(5)).square().sum().backward()
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == other[name].requires_grad
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other[name].grad, rtol=FLOAT32, atol=FLOAT32)


def test_dropout_survives_both_ways_and_draws_what_peft_draws(tmp_path):
    ours = inject_adapter_in_model(LoraConfig(**CONFIGS["dropout"]), Model())
    randomised(adapter_parameters(ours).values())
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(Model(), tmp_path / "theirs")
    results = []
    for model in (ours, theirs, back):
        torch.manual_seed(3)
        results.append(model.train()(inputs(5)))
    assert (results[0] - ours.eval()(inputs(5))).abs().max() > 0.1
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("writer", ["ours", "peft"])
def test_several_adapters_in_one_model_are_those_of_peft(writer, tmp_path):
    settings = {"a": CONFIGS["patterns"], "b": CONFIGS["some layers"] | {"r": 3}}
    if writer == "ours":
        ours = Model()
        for name, config in settings.items():
            inject_adapter_in_model(LoraConfig(**config), ours, name)
            randomised(adapter_parameters(ours, name).values())
            save_adapter(ours, tmp_path / name, name)
        theirs = peft.PeftModel.from_pretrained(Model(), tmp_path / "a", adapter_name="a")
        theirs.load_adapter(tmp_path / "b", adapter_name="b")
    else:
        theirs = peft.get_peft_model(Model(), peft.LoraConfig(**settings["a"]), adapter_name="a")
        theirs.add_adapter("b", peft.LoraConfig(**settings["b"]))
        randomised(p for name, p in theirs.named_parameters() if "lora_" in name)
        theirs.save_pretrained(tmp_path)
        ours = load_adapter(load_adapter(Model(), tmp_path / "a", "a"), tmp_path / "b", "b")
    outputs = []
    for active in ("a", "b", ["a", "b"]):
        set_adapter(ours, active)
        theirs.base_model.set_adapter(active)
        outputs.append(ours(inputs(5)))
        torch.testing.assert_close(outputs[-1], theirs(inputs(5)), rtol=FLOAT32, atol=FLOAT32)
    assert min((x - y).abs().max() for x, y in itertools.combinations(outputs, 2)) > 0.1


@pytest.mark.parametrize("name", ["layer", "query", "weight", "lora_A", "modules_to_save"])
def test_an_adapter_may_share_its_name_with_a_part_of_the_model(name, tmp_path):
    model = inject_adapter_in_model(LoraConfig(**CONFIGS["head"]), Model(), name)
    randomised(adapter_parameters(model, name).values())
    assert len(adapter_parameters(model, name)) == 3 * 2 + 2
    save_adapter(model, tmp_path, name)
    assert torch.equal(load_adapter(Model(), tmp_path)(inputs(5)), model(inputs(5)))
    assert torch.equal(load_adapter(Model(), tmp_path, name)(inputs(5)), model(inputs(5)))
