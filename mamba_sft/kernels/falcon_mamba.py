"""Falcon-Mamba's mixer, block and model forward, written on `causal_conv1d` and `selective_scan`.

`install(model)` turns the modules of a loaded `transformers` model into the classes below, in place: the
weights, the module names and the checkpoint stay what they were. What changes:

- Projections are called as modules, so LoRA, NF4 and int8 layers take part; the operations get activations
  only.
- Training computes what inference computes: the norms of dt, B and C come before `dt_proj`, always.
- `seq_idx` reaches every mixer, so that packed sequences do not see each other.
- A cache is continued exactly by any number of new tokens, not by single ones only.

The classes keep the names of the ones they replace, because saved configurations, device maps and FSDP
policies refer to classes by name.
"""

from __future__ import annotations

from dataclasses import fields
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.falcon_mamba import modeling_falcon_mamba as stock

from mamba_sft.kernels import BACKENDS, causal_conv1d, selective_scan
from mamba_sft.kernels.carry import Carry
from mamba_sft.kernels.decoding import can_decode, decode
from mamba_sft.kernels.residual_norm import norm_residual
from mamba_sft.kernels.time_step import project_dt

Model = TypeVar("Model", bound=nn.Module)

CACHE = "cache" if "cache" in {field.name for field in fields(stock.FalconMambaOutput)} else "cache_params"
"""What `transformers` calls the cache in outputs, and `generate` in calls: `cache` from release 5.24 on."""


def install(model: Model, backend: str = "auto") -> Model:
    """Make a Falcon-Mamba model compute with the kernels of this package; installing twice changes nothing.

    Args:
        model: A `FalconMambaForCausalLM` or `FalconMambaModel`, quantized or not, bare or wrapped by PEFT.
        backend: Passed to `causal_conv1d` and `selective_scan`: `auto`, `reference`, `cpu` or `triton`.

    Returns:
        The same object.

    Raises:
        ValueError: The backend has no such name, or there is no Falcon-Mamba mixer in `model`.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}, got {backend!r}")
    mixers = 0
    for module in model.modules():
        ours = REPLACEMENTS.get(type(module))
        if ours is not None:
            module.__class__ = ours
            # accelerate's hooks call the forward they found when they were added
            if "_old_forward" in vars(module):
                module._old_forward = MethodType(ours.forward, module)
        if isinstance(module, FalconMambaMixer):
            module.backend = backend
            mixers += 1
    if mixers == 0:
        raise ValueError(f"no FalconMambaMixer found in a {type(model).__name__}: not a Falcon-Mamba model")
    return model


class FalconMambaMixer(stock.FalconMambaMixer):
    """The mixer of one layer: projections as modules, convolution and scan as operations on activations."""

    backend = "auto"

    @force_accelerate_hooks(["conv1d"])
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        carry: Carry | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mix (B, L, hidden_size) along L.

        Args:
            hidden_states: Normed activations, (B, L, hidden_size).
            cache_params: Where the states before position 0 come from and the states after L - 1 go, or None.
            attention_mask: (B, L) or longer, of which the last L columns count; zeros silence padding.
            seq_idx: (B, L) integers, states restart where the value changes; None: each row is one sequence.
            carry: As `cache_params`, which it replaces, but differentiable.
            kwargs: Ignored, as in the model's other layers.
        """
        dtype = hidden_states.dtype
        conv_state, scan_state = (
            self._cached_states(cache_params) if carry is None else carry.enter(self.layer_idx)
        )
        mask = None if attention_mask is None else attention_mask[:, -hidden_states.shape[1] :, None]

        x, z = self.in_proj(_silence(hidden_states, mask)).chunk(2, dim=-1)
        inputs = x
        x, conv_state = causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu" if self.activation == "silu" else None,
            initial_state=conv_state,
            seq_idx=seq_idx,
            return_final_state=True,
            backend=self.backend,
        )
        if self.activation != "silu":
            x = self.act(x)
        x = _silence(x, mask)

        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = self.x_proj(x).split(sizes, dim=-1)
        dt, dt_bias = project_dt(self.dt_proj, self.dt_layernorm(dt))
        y, scan_state = selective_scan(
            x,
            dt,
            -torch.exp(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float()),
            self.b_layernorm(B),
            self.c_layernorm(C),
            self.D,
            z,
            dt_bias=dt_bias,
            dt_softplus=True,
            initial_state=scan_state,
            seq_idx=seq_idx,
            return_final_state=True,
            backend=self.backend,
        )
        if cache_params is not None:
            cache_params.update_conv_state(
                inputs.transpose(1, 2), self.layer_idx, conv_kernel_size=self.conv_kernel_size
            )
            cache_params.update_recurrent_state(scan_state, self.layer_idx)
        if carry is not None:
            carry.leave(self.layer_idx, conv_state, scan_state)
        return self.out_proj(y.to(dtype))

    def _cached_states(self, cache: Cache | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the (B, D, W - 1) inputs and the (B, D, N) state that the new tokens continue, or None."""
        if cache is None or not cache.has_previous_state(self.layer_idx):
            return None, None
        layer = cache.layers[self.layer_idx]
        past_inputs = layer.conv_states[0]
        conv_state = past_inputs[..., past_inputs.shape[-1] - (self.conv_kernel_size - 1) :]
        scan_state = layer.recurrent_states[0]
        if torch.is_grad_enabled():  # the cache is overwritten in place, and autograd keeps what it was given
            return conv_state.clone(), scan_state.clone()
        return conv_state, scan_state


class FalconMambaBlock(stock.FalconMambaBlock):
    """Norm, mixer and residual, with `seq_idx` handed on."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        carry: Carry | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map (B, L, hidden_size) to the same shape; the arguments are the mixer's."""
        residual = hidden_states.float() if self.residual_in_fp32 else hidden_states
        normed = norm_residual(self.norm, residual, self.norm.weight.dtype)
        return residual + self.mixer(normed, cache_params, attention_mask, seq_idx, carry)


class FalconMambaModel(stock.FalconMambaModel):
    """Embeddings, blocks and the last norm, with `seq_idx` handed on."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        carry: Carry | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple | stock.FalconMambaOutput:
        """Return the last hidden states, as `transformers` does, for tokens or embeddings.

        Args:
            input_ids: (B, L); give either these or `inputs_embeds`.
            inputs_embeds: (B, L, hidden_size).
            cache_params: States to continue, updated in place.
            use_cache: Whether to return a cache; by default as the configuration says, and never in training.
            output_hidden_states: Whether to return the residual stream after every block and the last norm.
            return_dict: Whether to return a `FalconMambaOutput` rather than a tuple.
            attention_mask: (B, L); zeros silence padding.
            seq_idx: (B, L) integers, states restart where the value changes.
            carry: States to continue and to hand on, differentiable; instead of a cache.
            cache: Another name of `cache_params`.
            kwargs: Ignored, as in `transformers`.

        Raises:
            ValueError: Both or neither of the inputs are given, a cache and a carry, or a cache under
                gradient checkpointing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache_params = cache if cache_params is None else cache_params
        if carry is not None:
            if cache_params is not None:
                raise ValueError("give either cache_params or carry")
            use_cache = False
        config = self.config
        output_hidden_states = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        return_dict = config.return_dict if return_dict is None else return_dict
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            if cache_params is not None:
                raise ValueError("a cache cannot be continued under gradient checkpointing: blocks run twice")
            use_cache = False
        if use_cache and cache_params is None:
            cache_params = DynamicCache(config=config)

        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if _masks_nothing(attention_mask, hidden_states):
            attention_mask = None
        seen = []
        asks_more = attention_mask is not None or output_hidden_states
        if not asks_more and can_decode(self.layers, self.norm_f, hidden_states, cache_params):
            hidden_states = decode(self.layers, self.norm_f, hidden_states, cache_params)
        else:
            for block in self.layers:
                hidden_states = block(
                    hidden_states,
                    cache_params=cache_params,
                    attention_mask=attention_mask,
                    seq_idx=seq_idx,
                    carry=carry,
                )
                seen.append(hidden_states if output_hidden_states else None)
            hidden_states = self.norm_f(hidden_states)
        all_hidden_states = (*seen, hidden_states) if output_hidden_states else None

        if not return_dict:
            return tuple(v for v in (hidden_states, cache_params, all_hidden_states) if v is not None)
        return stock.FalconMambaOutput(
            last_hidden_state=hidden_states,
            hidden_states=all_hidden_states,
            **{CACHE: cache_params if use_cache else None},
        )


class FalconMambaForCausalLM(stock.FalconMambaForCausalLM):
    """The language model, with `seq_idx` handed on."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Cache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        carry: Carry | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple | stock.FalconMambaCausalLMOutput:
        """Return logits and, with labels, the loss, as `transformers` does.

        Args:
            input_ids: (B, L); give either these or `inputs_embeds`.
            attention_mask: (B, L); zeros silence padding.
            inputs_embeds: (B, L, hidden_size).
            cache_params: States to continue, updated in place.
            labels: (B, L), shifted inside; -100 is not scored.
            output_hidden_states: Whether to return the residual stream after every block and the last norm.
            return_dict: Whether to return a `FalconMambaCausalLMOutput` rather than a tuple.
            use_cache: Whether to return a cache.
            logits_to_keep: How many last positions to compute logits for (0: all), or their indices.
            seq_idx: (B, L) integers, states restart where the value changes.
            carry: States to continue and to hand on, differentiable; instead of a cache.
            cache: Another name of `cache_params`.
            kwargs: For the loss function (`num_items_in_batch`); others are ignored.
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.backbone(
            input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache if cache_params is None else cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            carry=carry,
        )
        hidden_states = outputs[0]
        if not isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep > 0:
            hidden_states = hidden_states[:, -logits_to_keep:]
        # Asked of a parameter: the `weight` of a wrapped head can be a property that builds the whole matrix.
        logits = self.lm_head(hidden_states.to(next(self.lm_head.parameters()).dtype)).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )

        if not return_dict:
            return (logits, *outputs[1:]) if loss is None else (loss, logits, *outputs[1:])
        return stock.FalconMambaCausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: outputs.get(CACHE)}
        )


def _masks_nothing(mask: Tensor | None, hidden_states: Tensor) -> bool:
    """Whether the mask is all ones over these positions; asked on the CPU only, where it costs nothing."""
    if mask is None or mask.device.type != "cpu":
        return False
    return bool(mask[:, -hidden_states.shape[1] :].all())


def _silence(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero the padded positions of (B, L, D), given (B, L, 1) with zeros there."""
    return x if mask is None else (x * mask).to(x.dtype)


REPLACEMENTS: dict[type, type] = {
    stock.FalconMambaMixer: FalconMambaMixer,
    stock.FalconMambaBlock: FalconMambaBlock,
    stock.FalconMambaModel: FalconMambaModel,
    stock.FalconMambaForCausalLM: FalconMambaForCausalLM,
}
