"""Decoding one token at a time equals reading the whole sequence, by the short path where it may be taken."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mamba_sft.kernels import falcon_mamba
from mamba_sft.kernels.falcon_mamba import install
from tests.conftest import build_model

from .cases import relative_rms

LENGTH, READ = 20, 7  # tokens, and those of them that are read at once


@pytest.fixture
def tokens():
    return torch.randint(12, 512, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def short_ways(monkeypatch):
    """How often the short path was taken."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return decode(*arguments)

    decode = falcon_mamba.decode
    monkeypatch.setattr(falcon_mamba, "decode", counted)
    return calls


@torch.no_grad()
def decoded(model, tokens, attention_mask=None):
    """Logits of every position, the first ones read at once and the others token by token."""
    cache, logits = None, []
    for first, last in [(0, READ), *((t, t + 1) for t in range(READ, tokens.shape[1]))]:
        mask = None if attention_mask is None else attention_mask[:, :last]
        output = model(tokens[:, first:last], attention_mask=mask, cache_params=cache, use_cache=True)
        cache = output.cache_params
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def far_apart(logits, expected):
    return float((logits - expected).detach().abs().max() / expected.detach().abs().max())


# Sizes that do not fill a vector, several vectors of states, and every option of the configuration.
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_size": 36, "state_size": 5, "time_step_rank": 3, "conv_kernel": 3},
        {"state_size": 40, "use_bias": True, "use_conv_bias": False},
        {"residual_in_fp32": False, "tie_word_embeddings": True},
    ],
    ids=["plain", "odd sizes", "biases", "residual"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_token_by_token_is_the_whole_sequence(config, batch, tokens, short_ways):
    model, tokens = build_model(**config), tokens[:batch]
    expected = model(tokens).logits
    assert far_apart(decoded(install(model), tokens), expected) < 1e-5
    assert len(short_ways) == LENGTH - READ


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_where_the_whole_sequence_does(dtype, tokens, short_ways):
    model = install(build_model().to(dtype))
    expected = model(tokens).logits
    assert relative_rms(decoded(model, tokens), expected) < torch.finfo(dtype).eps
    assert len(short_ways) == LENGTH - READ


def test_a_residual_beyond_float16_is_decoded_too(tokens, short_ways):
    model = build_model(use_bias=True)
    model.backbone.embeddings.weight.data[:, 3] = 6e4
    model.backbone.layers[0].mixer.out_proj.bias.data[3] = 2e4
    model = install(model.half())
    expected = model(tokens).logits
    assert expected.isfinite().all()
    assert relative_rms(decoded(model, tokens), expected) < 4 * torch.finfo(torch.float16).eps
    assert len(short_ways) == LENGTH - READ


def test_left_padding_as_in_the_whole_sequence(tokens, short_ways):
    model = install(build_model())
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    assert far_apart(decoded(model, tokens, mask), model(tokens, attention_mask=mask).logits) < 1e-5
    assert len(short_ways) == LENGTH - READ


def test_a_masked_token_is_silenced(tokens, short_ways):
    model = install(build_model())
    mask = torch.ones_like(tokens)
    mask[1, 12] = 0
    assert far_apart(decoded(model, tokens, mask), model(tokens, attention_mask=mask).logits) < 1e-5
    assert len(short_ways) == LENGTH - READ - 1


def test_adapters_take_part_and_changed_weights_count(tokens, short_ways):
    targets = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = install(build_model())
    plain = model(tokens).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.tuners.tuners_utils._check_lora_target_modules_mamba", lambda *_: None)
        model = get_peft_model(model, config).eval()
    expected = model(tokens).logits
    assert far_apart(expected, plain) > 0.1
    assert far_apart(decoded(model, tokens), expected) < 1e-5
    for name, parameter in model.named_parameters():
        if not name.endswith("weight"):  # behind autograd's back, as some optimizers do
            parameter.data.mul_(1.1)
    changed = model(tokens).logits
    assert far_apart(changed, expected) > 1e-3
    assert far_apart(decoded(model, tokens), changed) < 1e-5
    assert len(short_ways) == 2 * (LENGTH - READ)


def test_projections_of_any_kind_are_called(tokens, short_ways):
    class Halved(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return 0.5 * self.linear(x)

    model = install(build_model())
    for block in model.backbone.layers:
        for name in ("in_proj", "x_proj", "out_proj"):
            setattr(block.mixer, name, Halved(getattr(block.mixer, name)))
    assert far_apart(decoded(model, tokens), model(tokens).logits) < 1e-5
    assert len(short_ways) == LENGTH - READ


@pytest.mark.parametrize("what", ["gradients", "hidden states", "reference", "a hook", "gelu", "no bias"])
def test_what_the_short_path_cannot_do_takes_the_long_one(what, tokens, short_ways):
    model = build_model(hidden_act="gelu" if what == "gelu" else "silu")
    install(model, backend="reference" if what == "reference" else "auto")
    heard = []
    if what == "a hook":
        model.backbone.layers[1].mixer.register_forward_hook(lambda *_: heard.append(1))
    if what == "no bias":
        model.backbone.layers[1].mixer.dt_proj.bias = None
    if what in ("gradients", "hidden states"):
        cache = model(tokens[:, :READ], use_cache=True).cache_params
        with torch.set_grad_enabled(what == "gradients"):
            output = model(
                tokens[:, READ : READ + 1], cache_params=cache, output_hidden_states=what == "hidden states"
            )
        assert output.logits.requires_grad == (what == "gradients")
        assert (output.hidden_states is not None) == (what == "hidden states")
    else:
        assert far_apart(decoded(model, tokens), model(tokens).logits) < 1e-5
    assert bool(heard) == (what == "a hook")
    assert not short_ways


def test_states_end_as_those_of_the_whole_sequence(tokens):
    model = install(build_model())
    with torch.no_grad():
        whole = model(tokens, use_cache=True).cache_params
        stepped = model(tokens[:, :READ], use_cache=True).cache_params
        places = [(x.conv_states[0], x.recurrent_states[0]) for x in stepped.layers]
        for t in range(READ, LENGTH):
            model(tokens[:, t : t + 1], cache_params=stepped, use_cache=True)
    for layer, (inputs, state), expected in zip(stepped.layers, places, whole.layers, strict=True):
        assert layer.conv_states[0] is inputs  # in place
        assert layer.recurrent_states[0] is state
        torch.testing.assert_close(inputs, expected.conv_states[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, expected.recurrent_states[0], rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_in_its_row(tokens, short_ways):
    model = install(build_model())
    with torch.no_grad():
        cache = model(tokens[:, :READ], use_cache=True).cache_params
        apart = copy.deepcopy(cache)
        cache.layers[0].recurrent_states[0][1, 3, 2] = torch.nan
        logits = model(tokens[:, READ : READ + 1], cache_params=cache).logits
        expected = model(tokens[:, READ : READ + 1], cache_params=apart).logits
    assert logits[1].isnan().any()
    assert torch.equal(logits[[0, 2]], expected[[0, 2]])
    assert len(short_ways) == 2


def test_a_failing_projection_leaves_the_model_as_it_was(tokens):
    model = install(build_model())
    mixer = model.backbone.layers[0].mixer
    bias = mixer.dt_proj.bias
    with torch.no_grad():
        cache = model(tokens[:, :READ], use_cache=True).cache_params
        mixer.dt_proj.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(tokens[:, READ : READ + 1], cache_params=cache)
    assert mixer.dt_proj.bias is bias
