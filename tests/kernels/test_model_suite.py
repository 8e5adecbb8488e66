"""What a model of transformers is expected to do, asked of one with our mixer, against the stock model.

`test_falcon_mamba.py` holds the mixer to the definition. This file goes through what transformers' own tests
of FalconMamba cover: shapes, caches, generation in all its modes, saving, copying, initialisation, resizing,
number formats, training.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transformers import FalconMambaConfig, FalconMambaForCausalLM, FalconMambaModel, set_seed
from transformers.models.falcon_mamba import modeling_falcon_mamba as stock

from mamba_sft.kernels import falcon_mamba
from mamba_sft.kernels.falcon_mamba import install
from tests.conftest import build_model

from .cases import relative_rms

BATCH, LENGTH = 3, 20


@pytest.fixture
def tokens():
    return torch.randint(12, 512, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def pair(tiny_model):
    """The stock model and a copy with our mixer."""
    return tiny_model, install(copy.deepcopy(tiny_model))


@pytest.fixture
def padded(tokens):
    """Tokens and mask of a batch whose rows start 0, 5 and 11 positions late."""
    starts = torch.tensor([0, 5, 11])[:, None]
    return tokens, (torch.arange(LENGTH) >= starts).long()


def same(values, expected, tolerance=1e-5):
    return relative_rms(values, expected) < tolerance


def gradients(model, tokens, **inputs):
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- outputs ------------------------------------------------------------------------------------------------


def test_shapes_of_everything_that_comes_out(tiny_model, tokens):
    config = tiny_model.config
    model = install(tiny_model)
    out = model(tokens, labels=tokens, output_hidden_states=True, use_cache=True)
    assert out.loss.shape == ()
    assert out.logits.shape == (BATCH, LENGTH, config.vocab_size)
    assert out.logits.dtype == torch.float32
    assert len(out.hidden_states) == config.num_hidden_layers + 1
    assert {x.shape for x in out.hidden_states} == {(BATCH, LENGTH, config.hidden_size)}
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    for layer in out.cache_params.layers:
        assert layer.conv_states[0].shape == (BATCH, config.intermediate_size, config.conv_kernel)
        assert layer.recurrent_states[0].shape == (BATCH, config.intermediate_size, config.state_size)


def test_the_cache_holds_what_stock_puts_there(pair, tokens):
    caches = [model(tokens, use_cache=True).cache_params for model in pair]
    for theirs, ours in zip(caches[0].layers, caches[1].layers, strict=True):
        assert same(ours.conv_states[0], theirs.conv_states[0])
        assert same(ours.recurrent_states[0], theirs.recurrent_states[0])


def test_a_tuple_has_the_values_of_the_named_output(tiny_model, tokens):
    model = install(tiny_model)
    named = model(tokens, labels=tokens, output_hidden_states=True, use_cache=False)
    loss, logits, hidden_states = model(
        tokens, labels=tokens, output_hidden_states=True, use_cache=False, return_dict=False
    )
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert all(torch.equal(x, y) for x, y in zip(hidden_states, named.hidden_states, strict=True))


def test_two_calls_give_the_same_bits(tiny_model, tokens):
    model = install(tiny_model)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    first, second = gradients(model.train(), tokens), gradients(model, tokens)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_embeddings_are_as_good_as_ids(tiny_model, tokens):
    model = install(tiny_model)
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)
    call = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    answers = model.generate(inputs_embeds=embeddings, **call)
    assert torch.equal(answers, model.generate(tokens, **call)[:, LENGTH:])


@pytest.mark.parametrize(
    "config",
    [
        {"state_size": 4, "conv_kernel": 3, "expand": 3},
        {"time_step_rank": 3, "hidden_size": 40},
        {"use_bias": True, "mixer_rms_eps": 1e-3, "layer_norm_epsilon": 1e-3},
        {"residual_in_fp32": False, "num_hidden_layers": 3},
    ],
    ids="-".join,
)
def test_other_configurations_as_stock(tokens, config):
    model = build_model(**config)
    expected, expected_gradients = model(tokens).logits, gradients(model, tokens)
    ours = install(model)
    assert same(ours(tokens).logits, expected)
    for name, gradient in gradients(ours, tokens).items():
        assert same(gradient, expected_gradients[name]), name


# --- the cache ----------------------------------------------------------------------------------------------


def test_token_by_token_is_the_whole(tiny_model, padded):
    tokens, mask = padded
    model = install(tiny_model)
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
        out = model(tokens[:, :12], attention_mask=mask[:, :12], use_cache=True)
        for t in range(12, LENGTH):
            out = model(
                tokens[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                cache_params=out.cache_params,
                use_cache=True,
            )
            assert same(out.logits[:, 0], whole[:, t]), t


def test_reordered_caches_follow_their_rows(tiny_model, tokens):
    model = install(tiny_model)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(tokens[:, :-1], use_cache=True).cache_params
        cache.reorder_cache(order)
        last = model(tokens[order][:, -1:], cache_params=cache).logits
        assert same(last[:, 0], model(tokens[order]).logits[:, -1])


def test_answers_can_be_continued(tiny_model, tokens):
    model = install(tiny_model)
    call = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(tokens, max_new_tokens=12, **call).sequences
    first = model.generate(tokens, max_new_tokens=5, **call)
    unread = first.sequences[:, -1:]  # the cache has read all but the last token
    second = model.generate(unread, cache_params=first.past_key_values, max_new_tokens=7, **call)
    assert torch.equal(second.sequences, whole[:, LENGTH + 4 :])


# --- generation ---------------------------------------------------------------------------------------------

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "several-samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 7},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled-beams": {"do_sample": True, "num_beams": 3},
    "repetition-penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "without-cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_generation_in_every_mode_as_stock(pair, padded, mode):
    tokens, mask = padded
    answers = []
    for model in pair:
        set_seed(5)
        answers.append(
            model.generate(tokens, attention_mask=mask, max_new_tokens=10, eos_token_id=None, **MODES[mode])
        )
    assert answers[0].shape[1] == LENGTH + 10
    assert torch.equal(*answers)


def test_scores_and_hidden_states_of_generation(pair, tokens):
    call = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    theirs, ours = (model.generate(tokens, **call, **wanted) for model in pair)
    assert len(ours.scores) == len(ours.logits) == len(ours.hidden_states) == 4
    for name in ("scores", "logits"):
        for x, y in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert same(x, y)
    for x, y in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert [layer.shape for layer in x] == [layer.shape for layer in y]


def test_a_padded_row_is_answered_as_if_alone(tiny_model, padded):
    tokens, mask = padded
    model = install(tiny_model)
    call = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    together = model.generate(tokens, attention_mask=mask, **call)[:, LENGTH:]
    for row, real, answer in zip(tokens, mask.bool(), together, strict=True):
        alone = model.generate(row[real][None], **call)
        assert torch.equal(alone[0, int(real.sum()) :], answer)


def test_a_stop_token_ends_a_row_and_pads_it(pair, tokens):
    free = pair[0].generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, LENGTH:]
    call = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": int(free[0, 2]), "pad_token_id": 1}
    theirs, ours = (model.generate(tokens, **call) for model in pair)
    assert torch.equal(ours, theirs)
    assert ours[0, LENGTH + 3 :].eq(1).all()


def test_guessing_ahead_is_refused_as_by_stock(pair, tokens):
    """A recurrent state cannot be rolled back when a guess turns out wrong."""
    for model in pair:
        with pytest.raises(ValueError, match="assisted generation is not supported"):
            model.generate(tokens[:1], prompt_lookup_num_tokens=2, max_new_tokens=4)


# --- weights ------------------------------------------------------------------------------------------------


def test_state_dicts_have_the_names_and_load_both_ways(pair):
    expected, model = pair
    assert list(model.state_dict()) == list(expected.state_dict())
    other = build_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    install(other).load_state_dict(expected.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(other.parameters(), expected.parameters(), strict=True))
    expected.load_state_dict(other.state_dict())


@pytest.mark.parametrize("shards", ["1GB", "100KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saving_and_loading_changes_nothing(tmp_path, tokens, tied, shards):
    model = install(build_model(tie_word_embeddings=tied))
    logits = model(tokens).logits
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "100KB")
    loaded = install(FalconMambaForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(loaded(tokens).logits, logits)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    backbone = install(FalconMambaModel.from_pretrained(tmp_path))
    assert torch.equal(backbone(tokens).last_hidden_state, model.backbone(tokens).last_hidden_state)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent_and_equal(tiny_model, tokens, through):
    model = install(tiny_model, backend="cpu")
    logits = model(tokens).logits
    if through == "deepcopy":
        other = copy.deepcopy(model)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(tokens).logits, logits)
    assert {type(block.mixer) for block in other.backbone.layers} == {falcon_mamba.FalconMambaMixer}
    assert {block.mixer.backend for block in other.backbone.layers} == {"cpu"}


def test_initialisation_is_stock(tokens):
    """Installed modules are initialised again as the stock ones they stand in for."""
    config = FalconMambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    set_seed(0)
    expected = FalconMambaForCausalLM(config)
    model = install(copy.deepcopy(expected))
    results = []
    for one in (expected, model):
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.fill_(3.0)
                parameter._is_hf_initialized = False
        for module in one.modules():
            module._is_hf_initialized = False
        set_seed(1)
        one.init_weights()
        results.append({name: p.detach().clone() for name, p in one.named_parameters()})
    changed = [name for name, p in results[0].items() if not p.eq(3.0).all()]
    assert any(name.endswith("A_log") for name in changed)
    assert any(name.endswith("dt_proj.bias") for name in changed)
    assert [name for name, p in results[0].items() if not torch.equal(p, results[1][name])] == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [500, 520])
def test_the_vocabulary_can_be_resized(tokens, tied, size):
    model = install(build_model(tie_word_embeddings=tied))
    few = tokens % 500
    with torch.no_grad():
        before = model(few).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    after = model(few)
    assert after.logits.shape[-1] == model.config.vocab_size == size
    assert same(after.logits[..., :500], before[..., :500])
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    model(few, labels=few).loss.backward()


# --- number formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_end_to_end(tmp_path, tiny_model, tokens, dtype):
    exact, exact_gradients = tiny_model(tokens).logits, gradients(tiny_model, tokens)
    tiny_model.save_pretrained(tmp_path)
    model = install(FalconMambaForCausalLM.from_pretrained(tmp_path, dtype=dtype)).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = model(tokens, use_cache=True)
    assert out.logits.dtype == torch.float32
    assert same(out.logits, exact, 20 * torch.finfo(dtype).eps)
    for name, gradient in gradients(model, tokens).items():
        assert gradient.dtype == dtype
        assert same(gradient, exact_gradients[name], 50 * torch.finfo(dtype).eps), name
    answers = model.generate(tokens, max_new_tokens=3, eos_token_id=None)
    assert answers.shape == (BATCH, LENGTH + 3)


def test_autocast_as_stock(pair, tokens):
    exact = pair[0](tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (relative_rms(model(tokens).logits, exact) for model in pair)
        loss = pair[1](tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert 1e-4 < ours < 1.5 * theirs  # autocast did round something
    assert all(p.grad.isfinite().all() for p in pair[1].parameters())


# --- training -----------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_the_next_token(tiny_model, tokens):
    model = install(tiny_model).train()
    labels = tokens.clone()
    labels[:, :7] = -100
    out = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 6:-1].flatten(0, 1), tokens[:, 7:].flatten())
    assert torch.allclose(out.loss, expected)
    summed = model(tokens, labels=labels, num_items_in_batch=2).loss
    assert torch.allclose(summed, expected * BATCH * (LENGTH - 7) / 2)
    assert out.cache_params is None


def test_every_weight_learns(tiny_model, tokens):
    model = install(tiny_model).train()
    found = gradients(model, tokens)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert [name for name, gradient in found.items() if not gradient.abs().max() > 0] == []


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_no_gradient(tiny_model, padded, reentrant):
    tokens, mask = padded
    model = install(tiny_model).train()
    expected = gradients(model, tokens, attention_mask=mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(model, tokens, attention_mask=mask)
    assert len(calls) == 2  # the block ran twice: it was not kept
    assert found.keys() == expected.keys()
    assert [name for name, gradient in found.items() if not torch.equal(gradient, expected[name])] == []
    model.gradient_checkpointing_disable()
    gradients(model, tokens)
    assert len(calls) == 3


def test_a_batch_can_be_learned_by_heart_in_step_with_stock(pair, tokens):
    losses = []
    for model in pair:
        optimizer = torch.optim.AdamW(model.train(False).parameters(), lr=3e-3)
        seen = []
        for _ in range(8):
            loss = model(tokens, labels=tokens, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(torch.tensor(seen))
    assert losses[1][-1] < 0.5 * losses[1][0]
    assert same(losses[1], losses[0], 1e-3)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "after training"])
def test_compiled_inference_as_eager(tiny_model, tokens, trained):
    torch._dynamo.reset()
    model = install(tiny_model)
    compiled = torch.compile(model, backend="eager")
    if trained:  # the compiler then runs some frames as they are, but compiles what these call
        torch.compile(model.train(), backend="eager")(tokens, labels=tokens).loss.backward()
        model.eval()
    with torch.no_grad():
        out = compiled(tokens[:, :-1], use_cache=True)
        last = compiled(tokens[:, -1:], cache_params=out.cache_params, use_cache=True).logits
        whole = model(tokens).logits
    assert same(out.logits, whole[:, :-1])
    assert same(last[:, 0], whole[:, -1])


def test_ours_are_the_classes_in_use(tiny_model):
    """Guards this file: every test above must have asked our mixer, not the one it stands in for."""
    model = install(tiny_model)
    kinds = {type(module) for module in model.modules()} & set(falcon_mamba.REPLACEMENTS)
    assert not kinds
    assert type(model.backbone.layers[0].mixer).forward is not stock.FalconMambaMixer.forward
