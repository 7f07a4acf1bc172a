"""The one module that imports `megatron.core`: a new version of it is this file's work.

Other rooms write `from megatron_encdec.platform import megatron as mcore` and use the names below.
Tested with 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12), on CPU.
"""

# ruff: noqa: E402, F401, I001  (the CPU backend has to be in place before the first mcore import; names for others)
import contextlib
import logging
import warnings

from megatron_encdec.platform import cpu_backend, gated
from megatron_encdec.platform.device import device_type
from megatron_encdec.platform.optional import keep_out_unusable, out_of_sight

# torch renames collectives faster than mcore follows
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
# a frozen shard of an fp32 parameter is a view without a gradient
warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf Tensor")
if device_type() == "cpu":
    cpu_backend.install()
    # Without a GPU mcore warns about missing Apex, TE and fused kernels at import: `doctor` says it better.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|transformer_engine).*")
    for name in ("megatron.core", "torch.utils.cpp_extension"):  # the latter: no GPU, though a CUDA toolkit is here
        logging.getLogger(name).setLevel(logging.ERROR)
keep_out_unusable(device_type() == "cuda")

# Its timers import both, for writers that are not used here: a third of a second and more of every start.
with (out_of_sight("torch.utils.tensorboard", "wandb"),
      cpu_backend.without_compilation() if device_type() == "cpu" else contextlib.nullcontext()):
    import megatron.core
    import megatron.core.distributed.param_and_grad_buffer as _buffers
    import megatron.core.models.gpt
    import megatron.core.optimizer.clip_grads as _clip_grads
    import megatron.core.tensor_parallel.random as _random
    import megatron.core.transformer.mlp as _mlp

if device_type() == "cpu":
    cpu_backend.install_rng(_random)
    cpu_backend.install_norm(_clip_grads)
    cpu_backend.install_gathering(_buffers)

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule, param_is_not_shared
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def use_swiglu(function) -> None:
    """From now on MLPs of this process compute [..., 2F] -> [..., F] by `function`. There are no biases."""
    _mlp.bias_swiglu_impl = lambda rows, _no_bias, *_settings: function(rows)


def use_geglu(function) -> None:
    """The same for the MLPs whose activation is gelu."""
    _mlp.bias_geglu_impl = lambda rows, _no_bias, *_settings: function(rows)


def unwrap_model(model):
    """The module inside megatron.core's DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


if device_type() == "cpu":
    use_swiglu(gated.swiglu)
use_geglu(gated.geglu)


def sum_over_tensor_ranks(x):
    """The sum of the tensor ranks' `x`, of which each uses its own part: so their gradients are summed, too."""
    return tensor_parallel.copy_to_tensor_model_parallel_region(
        tensor_parallel.reduce_from_tensor_model_parallel_region(x))


def counts_once(shard) -> bool:
    """Whether this rank's `shard` of a parameter is not a copy of another rank's: as for megatron.core's norm."""
    return param_is_not_shared(shard) and tensor_parallel.param_is_not_tensor_parallel_duplicate(shard)


def without_decay(parameters) -> dict:
    """`config_overrides` of `get_megatron_optimizer` that put `parameters` into a group without weight decay."""
    known = {id(parameter) for parameter in parameters}
    key = ParamKey(predicate=ParamPredicate("no_decay", lambda parameter: id(parameter) in known))
    return {key: {"weight_decay": 0.0}}


def transformer_engine_modules():
    """The layer classes that megatron.core builds on Transformer Engine; imports TE, so only where it is there."""
    from megatron.core.extensions import transformer_engine as te

    return te


def start_tensor_overlap(rows: int, width: int, tensor: int, fp8: bool) -> None:
    """Make the buffers through which Transformer Engine's layers exchange slices while they multiply.

    rows, width: of the activations [B * S, H] of a micro-batch. fp8: buffers for FP8 too; those for bf16 are always
    made, for evaluation and for layers that stay in it.
    """
    from transformer_engine.pytorch.module.base import UserBufferQuantizationMode as Mode, initialize_ub

    initialize_ub(shape=[rows, width], tp_size=tensor, quantization_modes=[Mode.NONE, Mode.FP8] if fp8 else [Mode.NONE],
                  bootstrap_backend="nccl")


def fp8_recipe(config):
    """Transformer Engine's recipe object for a TransformerConfig with `fp8` set."""
    from megatron.core.fp8_utils import get_fp8_recipe

    return get_fp8_recipe(config)


__version__ = megatron.core.__version__
