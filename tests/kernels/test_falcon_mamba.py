"""The installed mixer against the stock model: its inference forward is the definition."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache
from transformers.models.falcon_mamba import modeling_falcon_mamba as stock

from mamba_sft.kernels import falcon_mamba
from mamba_sft.kernels.falcon_mamba import install
from mamba_sft.kernels.residual_norm import norm_residual
from mamba_sft.kernels.time_step import project_dt
from tests.conftest import build_model

from .cases import relative_rms

LENGTH = 24


@pytest.fixture
def tokens():
    return torch.randint(12, 512, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pair(tiny_model):
    """The stock model and a copy with our mixer."""
    return tiny_model, install(copy.deepcopy(tiny_model))


def far_apart(logits, expected):
    """The largest difference of logits over the largest logit."""
    return float((logits - expected).detach().abs().max() / expected.detach().abs().max())


def loss_gradients(model, tokens, **inputs):
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_torch_can_take_the_memory_of_weights_back(tiny_model, tokens):
    """FSDP does, after every block; what numpy has looked at stays for ever."""
    model = install(tiny_model, backend="cpu")
    loss_gradients(model, tokens)
    held = [name for name, p in model.named_parameters() if not p.untyped_storage().resizable()]
    assert held == []


# --- installing ---------------------------------------------------------------------------------------------


def test_install_replaces_classes_and_keeps_everything_else(tiny_model):
    before = {name: p.data_ptr() for name, p in tiny_model.named_parameters()}
    assert install(tiny_model) is tiny_model
    assert {name: p.data_ptr() for name, p in tiny_model.named_parameters()} == before
    assert type(tiny_model) is falcon_mamba.FalconMambaForCausalLM
    assert isinstance(tiny_model, stock.FalconMambaForCausalLM)
    assert {type(block.mixer) for block in tiny_model.backbone.layers} == {falcon_mamba.FalconMambaMixer}
    assert type(tiny_model).__name__ == "FalconMambaForCausalLM"


def test_installing_again_changes_the_backend_only(tiny_model):
    install(install(tiny_model), backend="reference")
    assert {block.mixer.backend for block in tiny_model.backbone.layers} == {"reference"}
    assert type(tiny_model.backbone) is falcon_mamba.FalconMambaModel


def test_the_backbone_alone_will_do(tiny_model, tokens):
    expected = tiny_model.backbone(tokens).last_hidden_state
    backbone = install(copy.deepcopy(tiny_model.backbone))
    assert far_apart(backbone(tokens).last_hidden_state, expected) < 1e-5


def test_other_models_and_backends_are_refused(tiny_model):
    with pytest.raises(ValueError, match="no FalconMambaMixer found in a Linear"):
        install(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got 'cuda'"):
        install(tiny_model, backend="cuda")


def test_the_checkpoint_stays_a_stock_one(tmp_path, pair, tokens):
    expected, model = pair
    model.save_pretrained(tmp_path)
    loaded = stock.FalconMambaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["FalconMambaForCausalLM"]
    assert torch.equal(loaded.eval()(tokens).logits, expected(tokens).logits)


# --- the forward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_training_computes_what_stock_inference_computes(tiny_model, tokens, backend):
    model = install(copy.deepcopy(tiny_model), backend).train()
    assert far_apart(model(tokens).logits, tiny_model(tokens).logits) < 1e-5


def test_embeddings_hidden_states_and_tuples_as_stock(pair, tokens):
    expected, model = pair
    embeddings = expected.get_input_embeddings()(tokens)
    inputs = {"inputs_embeds": embeddings, "output_hidden_states": True, "logits_to_keep": 3}
    ours, theirs = model(**inputs), expected(**inputs)
    assert ours.logits.shape == theirs.logits.shape
    assert far_apart(ours.logits, theirs.logits) < 1e-5
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for x, y in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert far_apart(x, y) < 1e-5
    for use_cache in (True, False):
        call = {"labels": tokens, "return_dict": False, "use_cache": use_cache}
        assert len(model(tokens, **call)) == len(expected(tokens, **call))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.backbone()


@torch.no_grad()
def test_a_cache_goes_on_under_either_name(pair, tokens):
    """`transformers` says `cache_params`, and from 5.24 on `cache`: what is ignored would give nonsense."""
    model = pair[1]
    whole = model(tokens).logits[:, -1]
    for name in ("cache", "cache_params"):
        state = model(tokens[:, :-1], use_cache=True)[falcon_mamba.CACHE]
        last = model(tokens[:, -1:], **{name: state}, use_cache=True)
        assert far_apart(last.logits[:, 0], whole) < 1e-5
        assert last[falcon_mamba.CACHE] is state
        _, again = model.backbone(tokens[:, -1:], **{name: state}, return_dict=False)
        assert again is state


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_as_stock(pair, tokens, side):
    expected, model = pair
    mask = torch.ones_like(tokens)
    mask[0, slice(7) if side == "left" else slice(-7, None)] = 0
    real = mask.bool()
    ours, theirs = (m(tokens, attention_mask=mask).logits for m in (model, expected))
    assert far_apart(ours[real], theirs[real]) < 1e-5
    alone = model(tokens[:1, 7:] if side == "left" else tokens[:1, :-7]).logits
    assert far_apart(ours[:1][real[:1]], alone[0]) < 1e-5


def test_bfloat16_stays_as_close_as_stock(tiny_model, tokens):
    exact = tiny_model(tokens).logits
    half = copy.deepcopy(tiny_model).bfloat16()
    theirs = relative_rms(half(tokens).logits, exact)
    ours = relative_rms(install(half)(tokens).logits, exact)
    assert ours < 1.1 * theirs < 0.1


def test_bfloat16_adds_the_time_step_bias_in_float32(tiny_model):
    mixer = install(tiny_model.bfloat16()).backbone.layers[0].mixer
    x = torch.randn(1, 5, mixer.time_step_rank, dtype=torch.bfloat16)
    dt, bias = project_dt(mixer.dt_proj, x)
    assert torch.equal(dt, torch.nn.functional.linear(x, mixer.dt_proj.weight))
    assert bias is mixer.dt_proj.bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_residual_beyond_float16_is_normed_before_it_is_rounded(tiny_model, dtype):
    stream = torch.randn(1, 6, tiny_model.config.hidden_size)
    stream[..., 3] = 7e4
    exact = copy.deepcopy(tiny_model).double().backbone.layers[0](stream.double()) - stream
    block = install(copy.deepcopy(tiny_model).to(dtype)).backbone.layers[0]
    ours = block(stream) - stream
    assert ours.isfinite().all()
    channels = [channel for channel in range(stream.shape[-1]) if channel != 3]  # 7e4 leaves no digits there
    assert relative_rms(ours[..., channels], exact[..., channels]) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_types_are_rounded_before_as_stock_does(tiny_model, dtype):
    norm = tiny_model.to(dtype).backbone.layers[0].norm
    stream = torch.randn(1, 6, tiny_model.config.hidden_size)
    assert torch.equal(norm_residual(norm, stream, dtype), norm(stream.to(dtype)))


def test_float64_takes_the_definition(tiny_model, tokens):
    model = install(copy.deepcopy(tiny_model).double())
    assert far_apart(model(tokens).logits, tiny_model(tokens).logits) < 1e-5


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_other_activations_and_biases_as_stock(tokens, activation):
    model = build_model(hidden_act=activation, use_bias=True, use_conv_bias=False)
    expected = model(tokens).logits
    assert far_apart(install(model)(tokens).logits, expected) < 1e-5


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_match_a_float64_stock_model(tokens, tied):
    model = build_model(tie_word_embeddings=tied)
    exact = loss_gradients(copy.deepcopy(model).double(), tokens)
    for name, gradient in loss_gradients(install(model).train(), tokens).items():
        assert relative_rms(gradient, exact.pop(name)) < 1e-5, name
    assert not exact


def test_checkpointing_changes_no_gradient(tiny_model, tokens):
    model = install(tiny_model).train()
    seq_idx = torch.arange(LENGTH)[None].expand(2, -1) // 5
    expected = loss_gradients(model, tokens, seq_idx=seq_idx)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        gradients = loss_gradients(model, tokens, seq_idx=seq_idx)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert relative_rms(gradient, expected[name]) < 1e-6, name
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        model(tokens, cache_params=DynamicCache(config=model.config))


def test_every_adapter_learns_also_around_dt_proj(tiny_model, tokens):
    targets = ["in_proj", "x_proj", "dt_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(tiny_model, config)
    install(model)
    exact = loss_gradients(copy.deepcopy(model).double(), tokens)
    gradients = loss_gradients(model, tokens)
    assert len(gradients) == 2 * 2 * len(targets)
    for name, gradient in gradients.items():
        assert relative_rms(gradient, exact[name]) < 1e-5, name

    packed = model(tokens, seq_idx=torch.arange(LENGTH)[None].expand(2, -1) // 8).logits
    apart = model.eval()(tokens.view(6, 8)).logits.view(packed.shape)
    assert far_apart(packed, apart) < 1e-5
    merged = model.merge_and_unload()
    assert far_apart(merged(tokens.view(6, 8)).logits.view(packed.shape), apart) < 1e-5


# --- packing ------------------------------------------------------------------------------------------------


def test_packed_sequences_do_not_see_each_other(tiny_model, tokens):
    model = install(tiny_model).train()
    lengths = [1, 1, 9, 13]
    row = tokens[:1]
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(row, seq_idx=seq_idx).logits
    alone = torch.cat([model(part).logits for part in row.split(lengths, dim=1)], dim=1)
    assert far_apart(packed, alone) < 1e-5
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (packed, alone)
    )
    for x, y in zip(ours, theirs, strict=True):
        assert relative_rms(x, y) < 1e-5
    assert far_apart(model(row).logits, alone) > 1e-2  # it is the numbers that keep them apart


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_generation_is_stock_token_for_token(pair, tokens, padded):
    expected, model = pair
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :9] = 0
    call = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    theirs = expected.generate(tokens, **call)
    assert torch.equal(model.generate(tokens, **call), theirs)
    assert torch.equal(model.generate(tokens, **call, use_cache=False), theirs)
    assert torch.equal(
        model.generate(tokens, **call, num_beams=2), expected.generate(tokens, **call, num_beams=2)
    )


@pytest.mark.parametrize("cuts", [[1], [2, 3, 4], [10, 11, 20], [5, 17]])
def test_a_cache_is_continued_by_any_number_of_tokens(tiny_model, tokens, cuts):
    model = install(tiny_model)
    cache = None
    logits = []
    with torch.no_grad():
        for first, last in zip([0, *cuts], [*cuts, LENGTH], strict=True):
            output = model(tokens[:, first:last], cache_params=cache, use_cache=True)
            cache = output.cache_params
            logits.append(output.logits)
        assert far_apart(torch.cat(logits, dim=1), model(tokens).logits) < 1e-5


def test_a_cache_of_stock_can_be_continued_and_the_other_way_round(pair, tokens):
    with torch.no_grad():
        whole = pair[0](tokens).logits
        for first, second in (pair, pair[::-1]):
            cache = first(tokens[:, :-1], use_cache=True).cache_params
            last = second(tokens[:, -1:], cache_params=cache, use_cache=True).logits
            assert far_apart(last[:, -1], whole[:, -1]) < 1e-5


def test_left_padding_is_remembered_across_chunks(tiny_model, tokens):
    model = install(tiny_model)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    with torch.no_grad():
        cache = model(tokens[:, :15], attention_mask=mask[:, :15], use_cache=True).cache_params
        rest = model(tokens[:, 15:], attention_mask=mask, cache_params=cache).logits
        assert far_apart(rest, model(tokens, attention_mask=mask).logits[:, 15:]) < 1e-5


def test_a_cache_carries_a_state_with_gradients_enabled(tiny_model, tokens):
    model = install(tiny_model)
    output = model(tokens[:, :10], use_cache=True)
    second = model(tokens[:, 10:], cache_params=output.cache_params, use_cache=True)
    model(tokens[:, :3], cache_params=second.cache_params)
    second.logits.sum().backward()
    assert model.backbone.embeddings.weight.grad.isfinite().all()


# --- machinery around the model -----------------------------------------------------------------------------


def test_accelerate_hooks_added_before_installing_call_our_forward(tiny_model, tokens, monkeypatch):
    from accelerate.hooks import ModelHook, add_hook_to_module

    expected = tiny_model(tokens).logits
    for module in tiny_model.modules():
        add_hook_to_module(module, ModelHook())
    install(tiny_model)
    monkeypatch.setattr(stock, "mamba_selective_scan", None)
    assert far_apart(tiny_model(tokens).logits, expected) < 1e-5


def test_offloaded_weights_come_back_when_needed(tiny_model, tokens):
    from accelerate import cpu_offload

    expected = tiny_model(tokens).logits
    install(tiny_model)
    cpu_offload(tiny_model, execution_device="cpu")
    assert all(p.is_meta for p in tiny_model.parameters())
    assert far_apart(tiny_model(tokens).logits, expected) < 1e-5


def test_compiling_around_it_works(tiny_model, tokens):
    model = install(tiny_model).train()
    expected = loss_gradients(model, tokens)
    compiled = torch.compile(model, backend="eager")
    for name, gradient in loss_gradients(compiled, tokens).items():
        assert relative_rms(gradient, expected[name.removeprefix("_orig_mod.")]) < 1e-5, name
