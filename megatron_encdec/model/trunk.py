"""The trunk: one megatron.core GPTModel for every objective.

What an objective changes comes with the micro-batch: inputs, labels and the attention kind. Parameter names and
shapes never change, so a switch of objective is nothing but the next micro-batch.

Initial weights are a function of (run seed, parameter name, global position), the same on any TP/PP/DP: megatron.core's
sharded state says, for each local tensor, its global name, shape and offset. The global tensor is drawn in blocks of
rows, each from its own counter-based stream; a rank draws only the blocks that cross its slice, and keeps its part.
N(0, std) for every matrix (arXiv 2507.00994, training code; its table prints sigma^2 = 0.2); norms 1 (zero-centred ones
0), biases 0.

Shape suffixes: S window length, B windows of a micro-batch, H hidden size, N labelled positions.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from megatron_encdec.model.attention import AttentionContext, context_of_windows
from megatron_encdec.model.config import ModelConfig, choose_layers
from megatron_encdec.model.head import DenseHead, Head
from megatron_encdec.model.layers import NORMS, block_spec
from megatron_encdec.model.performance import PerformanceSettings, accumulation_fusion, choose_attention, core_options
from megatron_encdec.model.precision import PrecisionSettings, fp8_options
from megatron_encdec.model.rope import Rope, rotary_angles
from megatron_encdec.platform import megatron as mcore
from megatron_encdec.platform.device import device
from megatron_encdec.platform.distributed import Topology

_ROWS_PER_BLOCK = 256  # of initial weights


class Trunk(mcore.GPTModel):
    """This rank's part of a GPTModel that computes logits only where a label is; attention comes with the micro-batch.
    packed: activations are [B * S, 1, H], windows end to end, instead of [S, B, H]."""

    def __init__(self, model: ModelConfig, config: mcore.TransformerConfig, layers: str, topology: Topology,
                 sequence_length: int, performance: PerformanceSettings | None = None):
        performance = performance or PerformanceSettings()
        self.packed = (layers == "transformer_engine"
                       or choose_attention(performance.attention, config.params_dtype,
                                           model.attention_softcap) == "packed")
        super().__init__(
            config, block_spec(layers, mcore.get_num_layers_to_build(config), model, topology.first_stage, config),
            vocab_size=model.padded_vocabulary_size, max_sequence_length=sequence_length,
            pre_process=topology.first_stage, post_process=topology.last_stage,
            share_embeddings_and_output_weights=model.tied_embeddings, position_embedding_type="none")
        if model.qk_norm_over == "heads":  # each tensor rank has others, whose gradients megatron.core would sum
            config.qk_layernorm = False
        self.model = model
        factor = model.embedding_multiplier  # rounded as the weights are (Gemma)
        self._embedding_multiplier = factor and torch.tensor(factor, dtype=config.params_dtype).item()
        # a stage without anything to train still passes a backward, and recomputation looks at its input alone
        self._passes_gradients = topology.pipeline > 1 or config.recompute_granularity is not None
        self._angles: dict[tuple[Rope, int], tuple[torch.Tensor, float]] = {}
        self._kernels = performance.kernels()
        if self._kernels:
            mcore.use_swiglu(self._kernels.swiglu)
        if self.post_process:
            dense = model.prediction_head == "dense"
            Head.adopt(self.output_layer, performance.head_chunk, self._kernels, model.logits_softcap, with_bias=dense)
            self.prediction_head = DenseHead(config, NORMS[model.norm]) if dense else None

    def attention_context(self, kind: str, cu_seqlens: torch.Tensor, longest: int, isolated: bool,
                          windows: int, length: int, rope: Rope | None = None) -> AttentionContext:
        """What the layers need to know of one micro-batch of `windows` x `length` tokens. rope: the phase's, where it
        is not the model's."""
        dtype = self.config.params_dtype
        most = min(length, 1 << (longest - 1).bit_length())  # few values: some kernels are planned anew for each
        capped = self.model.attention_softcap is not None  # torch's fused kernels bound no scores

        def within(window: int | None, rope: Rope) -> AttentionContext:
            angles_SD, factor = self._rotary(rope, length)
            turns = ((turn(angles_SD) * factor).to(dtype) for turn in (torch.cos, torch.sin))
            if self.packed:
                cos, sin = (turn.repeat(windows, 1)[:, None] for turn in turns)
                return AttentionContext(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens,
                                        max_seqlen_q=most, max_seqlen_kv=most, kind=kind, cos=cos, sin=sin,
                                        sliding_window=window, kernels=self._kernels, explicit=capped)
            cos, sin = (turn[:, None, None] for turn in turns)
            return context_of_windows(kind, window, cu_seqlens, windows, length, isolated, dtype, capped or None,
                                      cos=cos, sin=sin)

        model, rope = self.model, rope or self.model.rope
        context = within(None, rope)
        bounded = model.sliding_window is not None and (most if self.packed else length) > model.sliding_window
        if bounded or (model.layers_with_window and rope.local_theta is not None):  # else they see and turn alike
            context.others = dict.fromkeys((layer + 1 for layer in model.layers_with_window),
                                           within(model.sliding_window if bounded else None, rope.of_windows))
        return context

    def _rotary(self, rope: Rope, length: int) -> tuple[torch.Tensor, float]:
        """Angles [S, D/2] of `length` positions, and the factor on cosine and sine; the last ones are kept."""
        if (rope, length) not in self._angles:
            angles = rotary_angles(length, self.model.head_dim, rope.theta, device(), rope.scaling)
            self._angles = {**dict(list(self._angles.items())[-7:]), (rope, length): angles}
        return self._angles[rope, length]

    def hidden_states(self, inputs_BS: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """This stage's output, [S, B, H] (packed layers: [B * S, 1, H]); under sequence parallelism this rank's slice
        of it. The first stage reads `inputs_BS`, the others their pipeline input."""
        hidden = None
        if self.pre_process:
            ids = inputs_BS.reshape(1, -1) if self.packed else inputs_BS
            hidden = self.embedding(input_ids=ids, position_ids=None)
            if self._embedding_multiplier is not None:
                hidden = hidden * self._embedding_multiplier
            if self._passes_gradients and torch.is_grad_enabled():
                hidden.requires_grad_()  # also where the embeddings are frozen
        return self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=context)

    def logits(self, hidden: torch.Tensor, positions_N: torch.Tensor, windows: int) -> torch.Tensor:
        """Logits [N, V] of this rank's vocabulary columns at the flat positions `b * S + s`."""
        rows_NH = self._rows(hidden, positions_N, windows)
        logits_N1V, _ = self.output_layer(rows_NH[:, None], weight=self._table())
        return logits_N1V.flatten(0, 1)

    def forward(self, inputs_BS, context: AttentionContext, positions_N=None, labels_N=None, summed: bool = False,
                weights_N=None):
        """On the last stage the loss of each labelled position [N] in fp32, without gradients, or, if `summed`, their
        sum, with gradients; hidden states on the others. positions_N: flat, b * S + s, ascending. weights_N: of the
        losses in the sum, None where each is 1."""
        hidden = self.hidden_states(inputs_BS, context)
        if not self.post_process:
            return hidden
        rows_NH = self._rows(hidden, positions_N, inputs_BS.shape[0])
        total, losses_N = self.output_layer(rows_NH, weight=self._table(), labels_N=labels_N,
                                            vocabulary_size=self.model.vocabulary_size, weights_N=weights_N)
        return total if summed else losses_N

    def _rows(self, hidden: torch.Tensor, positions_N: torch.Tensor, windows: int) -> torch.Tensor:
        """What the output matrix reads, [N, H], at the flat positions `b * S + s`, whole on every tensor rank."""
        if self.config.sequence_parallel:
            hidden = mcore.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if not self.packed:  # rows are ordered s * B + b
            length = rows.shape[0] // windows
            positions_N = (positions_N % length) * windows + positions_N // length
        rows_NH = rows.index_select(0, positions_N)
        rows_NH = rows_NH if self.prediction_head is None else self.prediction_head(rows_NH)
        return rows_NH if self.model.logits_scaling is None else rows_NH / self.model.logits_scaling

    def _table(self) -> torch.Tensor | None:
        return self.shared_embedding_or_output_weight() if self.model.tied_embeddings else None

    @contextlib.contextmanager
    def without_fp8(self) -> Iterator[None]:
        """The layers' products in bf16 while this is open, and no FP8 state touched."""
        recipe, self.config.fp8 = self.config.fp8, None
        try:
            yield
        finally:
            self.config.fp8 = recipe


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _gelu_tanh(gate: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh")


def transformer_config(model: ModelConfig, topology: Topology, dtype: torch.dtype, sequence_parallel: bool,
                       extra: dict | None = None) -> mcore.TransformerConfig:
    """megatron.core's view of the trunk; `extra`: what `performance` and `precision` come to, if not the defaults."""
    extra = core_options(PerformanceSettings(), None) if extra is None else extra
    if model.activation == "geglu_tanh":  # megatron.core's fused functions know no approximation
        extra = extra | {"bias_activation_fusion": False}
    without_rope = [int(layer in model.layers_without_rope) for layer in range(model.num_layers)]
    return mcore.TransformerConfig(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads, num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim, layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=model.norm_zero_centered, softmax_scale=model.attention_multiplier,
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm], gated_linear_unit=True,
        activation_func={"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": _gelu_tanh}[model.activation],
        add_bias_linear=False, add_qkv_bias=model.qkv_bias, qk_layernorm=model.qk_norm,
        no_rope_freq=without_rope if any(without_rope) else None, hidden_dropout=0.0, attention_dropout=0.0,
        # mcore marks a parameter as split over tensor ranks while it initialises it (grad norms depend on the
        # mark), so let it initialise, with nothing: `fill_initial_weights` comes after
        init_method=_leave, output_layer_init_method=_leave, embedding_init_method=_leave,
        tensor_model_parallel_size=topology.tensor, pipeline_model_parallel_size=topology.pipeline,
        sequence_parallel=sequence_parallel and topology.tensor > 1,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True, masked_softmax_fusion=False, bias_dropout_fusion=False,
        apply_rope_fusion=False, persist_layer_norm=False, **extra)


def build_trunk(model: ModelConfig, topology: Topology, dtype: torch.dtype, sequence_length: int, seed: int,
                sequence_parallel: bool = False, performance: PerformanceSettings | None = None,
                precision: PrecisionSettings | None = None) -> Trunk:
    """This rank's part of the trunk; weights are a function of `seed`, name and global position alone."""
    performance = performance or PerformanceSettings()
    layers = choose_layers(model.layers, dtype, model.attention_softcap)
    fusion = accumulation_fusion(performance.fuse_gradients, layers)
    extra = core_options(performance, fusion) | fp8_options(precision or PrecisionSettings())
    config = transformer_config(model, topology, dtype, sequence_parallel, extra)
    trunk = Trunk(model, config, layers, topology, sequence_length, performance).to(device())
    if fusion == "transformer_engine":  # its layers alone: megatron.core's own would want Apex
        for module in trunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
    fill_initial_weights(trunk, seed, model.init_std, model.initial_norm)
    return trunk


def fill_initial_weights(trunk: torch.nn.Module, seed: int, std: float, norms: float = 1.0) -> None:
    """Overwrite every parameter of `trunk` in place. norms: their weights."""
    sharded = trunk.sharded_state_dict()
    mcore.apply_factories(sharded)  # an MLP's first layer holds two global tensors' slices in one local tensor
    with torch.no_grad():
        for shard in mcore.nested_values(sharded):
            if isinstance(shard, mcore.ShardedTensor) and shard.data is not None:
                _fill(shard, seed, std, norms)


def _fill(shard: mcore.ShardedTensor, seed: int, std: float, norms: float) -> None:
    lead = shard.prepend_axis_num  # the layer number comes as an extra leading axis
    name = "/".join([shard.key, *map(str, shard.global_offset[:lead])])
    shape, offset = shard.global_shape[lead:], shard.global_offset[lead:]
    if len(shape) == 1:
        shard.data.fill_(0.0 if shard.key.endswith(".bias") else norms)
        return
    values = normal_slice(seed, name, shape, offset, tuple(shard.data.shape))
    shard.data.copy_(torch.from_numpy(values).mul_(std))


def normal_slice(seed: int, name: str, shape: tuple, offset: tuple, size: tuple) -> np.ndarray:
    """The part at `offset`, of `size`, of a global [rows, columns] fp32 matrix of standard normals; as many threads as
    torch may use."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    (first_row, first_column), (rows, columns) = offset, size
    found = np.empty(size, dtype=np.float32)

    def fill(block: int) -> None:
        start = block * _ROWS_PER_BLOCK
        stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, block]))
        block_rows = min(_ROWS_PER_BLOCK, shape[0] - start)
        values = stream.standard_normal((block_rows, shape[1]), dtype=np.float32)
        low, high = max(first_row - start, 0), min(first_row + rows - start, block_rows)
        found[start + low - first_row:start + high - first_row] = values[low:high, first_column:first_column + columns]

    blocks = range(first_row // _ROWS_PER_BLOCK, -(-(first_row + rows) // _ROWS_PER_BLOCK))
    with ThreadPoolExecutor(max(1, min(len(blocks), torch.get_num_threads()))) as pool:
        list(pool.map(fill, blocks))
    return found
