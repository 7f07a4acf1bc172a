"""The trunk: one megatron.core GPTModel for every objective.

    1. `build_trunk(...)`      this rank's part (tensor slice, pipeline stage) with its initial weights
    2. `Trunk.forward(...)`    tokens -> hidden states -> loss per labelled position

What an objective changes comes with the micro-batch: inputs, labels and the attention kind. Parameter names and
shapes never change, so a switch of objective is nothing but the next micro-batch.

Shape suffixes: S window length, B windows of a micro-batch, H hidden size, N labelled positions.
"""

import torch
import torch.nn.functional as F

from megatron_encdec.model.attention import AttentionContext, explicit_is_faster, segment_mask
from megatron_encdec.model.config import ModelConfig, choose_layers
from megatron_encdec.model.head import vocabulary_parallel_cross_entropy
from megatron_encdec.model.initial import fill_initial_weights
from megatron_encdec.model.layers import block_spec
from megatron_encdec.model.rope import rotary_angles
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device
from megatron_encdec.platform.distributed import Topology


class Trunk(mcore.GPTModel):
    """A GPTModel that computes logits only where a label is and takes attention from the micro-batch."""

    def __init__(self, model: ModelConfig, config: mcore.TransformerConfig, layers: str, topology: Topology,
                 sequence_length: int):
        spec = block_spec(layers, mcore.get_num_layers_to_build(config), model.qk_norm)
        super().__init__(
            config, spec, vocab_size=model.padded_vocabulary_size, max_sequence_length=sequence_length,
            pre_process=topology.first_stage, post_process=topology.last_stage,
            share_embeddings_and_output_weights=model.tied_embeddings, position_embedding_type="none")
        self.model = model
        self.packed = layers == "transformer_engine"
        self._angles_SD, self._rotary_factor = rotary_angles(sequence_length, model.head_dim, model.rope_theta,
                                                             device(), model.rope_scaling)
        if self.post_process:
            # The head gets a few selected rows, not this rank's slice of the sequence: gather before selecting.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = topology.tensor > 1

    def attention_context(self, kind: str, cu_seqlens: torch.Tensor, longest: int, isolated: bool,
                          windows: int, length: int) -> AttentionContext:
        """What the layers need to know of one micro-batch of `windows` x `length` tokens."""
        dtype = self.config.params_dtype
        angles_SD = self._angles_SD[:length]
        turns = tuple((turn(angles_SD) * self._rotary_factor).to(dtype) for turn in (torch.cos, torch.sin))
        if self.packed:
            cos, sin = (turn.repeat(windows, 1)[:, None] for turn in turns)
            return AttentionContext(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
                                    max_seqlen_q=longest, max_seqlen_kv=longest, kind=kind, cos=cos, sin=sin)
        cos, sin = (turn[:, None, None] for turn in turns)
        explicit, mask_B1SS = explicit_is_faster(length, dtype), None
        if isolated:
            mask_B1SS = segment_mask(cu_seqlens, windows, length, kind, dtype)
        elif explicit and kind == "causal":
            mask_B1SS = segment_mask(cu_seqlens[:2], 1, length, kind, dtype)  # one mask for all windows
        return AttentionContext(qkv_format="sbhd", kind=kind, cos=cos, sin=sin, mask_B1SS=mask_B1SS,
                                explicit=explicit)

    def hidden_states(self, inputs_BS: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Run this stage's layers; the first stage reads `inputs_BS`, the others their pipeline input.

        Returns [S, B, H] (packed layers: [B * S, 1, H]); under sequence parallelism this rank's slice of it.
        """
        hidden = None
        if self.pre_process:
            if self.packed:
                inputs_BS = inputs_BS.reshape(1, -1)
            hidden = self.embedding(input_ids=inputs_BS, position_ids=None)
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=context)

    def logits(self, hidden: torch.Tensor, positions_N: torch.Tensor, windows: int) -> torch.Tensor:
        """Logits [N, V] of this rank's vocabulary columns at the flat positions `b * S + s`."""
        if self.config.sequence_parallel:
            hidden = mcore.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if not self.packed:  # rows are ordered s * B + b
            length = rows.shape[0] // windows
            positions_N = (positions_N % length) * windows + positions_N // length
        weight = self.shared_embedding_or_output_weight() if self.model.tied_embeddings else None
        logits_N1V, _ = self.output_layer(rows.index_select(0, positions_N)[:, None], weight=weight)
        return logits_N1V.flatten(0, 1)

    def forward(self, inputs_BS, context: AttentionContext, positions_N=None, labels_N=None):
        """Loss per labelled position [N] in fp32 on the last stage; hidden states on the others.

        inputs_BS: int64 token ids. positions_N: flat positions b * S + s of the labels, ascending.
        """
        hidden = self.hidden_states(inputs_BS, context)
        if not self.post_process:
            return hidden
        logits_NV = self.logits(hidden, positions_N, inputs_BS.shape[0])
        return vocabulary_parallel_cross_entropy(logits_NV, labels_N, self.model.vocabulary_size,
                                                 self.pg_collection.tp)


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def transformer_config(model: ModelConfig, topology: Topology, dtype: torch.dtype,
                       sequence_parallel: bool) -> mcore.TransformerConfig:
    """megatron.core's view of the trunk; every fusion that needs a CUDA kernel of its own is off."""
    return mcore.TransformerConfig(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads, num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim, normalization="RMSNorm", layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm, no_rope_freq=model.rope_pattern,
        hidden_dropout=0.0, attention_dropout=0.0,
        # mcore marks a parameter as split over tensor ranks while it initialises it (grad norms depend on the
        # mark), so let it initialise, with nothing: model/initial.py fills the weights
        init_method=_leave, output_layer_init_method=_leave, embedding_init_method=_leave,
        tensor_model_parallel_size=topology.tensor, pipeline_model_parallel_size=topology.pipeline,
        sequence_parallel=sequence_parallel and topology.tensor > 1,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False,
        persist_layer_norm=False)


def build_trunk(model: ModelConfig, topology: Topology, dtype: torch.dtype, sequence_length: int,
                seed: int, sequence_parallel: bool = False) -> Trunk:
    """This rank's part of the trunk; weights are a function of `seed`, name and global position alone."""
    config = transformer_config(model, topology, dtype, sequence_parallel)
    trunk = Trunk(model, config, choose_layers(model.layers), topology, sequence_length).to(device())
    fill_initial_weights(trunk, seed, model.init_std)
    return trunk
