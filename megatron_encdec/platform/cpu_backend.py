"""Lets `megatron.core` run on a CPU with gloo: answers its CUDA queries, sends its CUDA literals to the CPU.

megatron.core names CUDA in its code (`device="cuda"`, streams, `torch.cuda.FloatTensor`). `install()` must run
before it is imported and changes this process only. Nothing here is used on a GPU. Four groups:

    1. queries       torch.cuda.current_device(), memory statistics, synchronise   -> the CPU, zero, nothing
    2. streams       Stream, Event and their contexts                              -> objects that do nothing
    3. literals      torch.zeros(..., device="cuda"), tensor.cuda(), .to("cuda")   -> the CPU
    4. type names    tensor.type() == "torch.cuda.BFloat16Tensor"                  -> what mcore compares with

Two parts of it are replaced by ones that do the same, better: `install_norm`, `install_gathering`.
`without_compilation()` wraps the import itself: mcore decorates small functions with `torch.compile`, which on
a CPU would load a compiler for each process and gain nothing.
"""

import contextlib
import functools

import torch
import torch.utils._device

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint",
              "zeros_like", "ones_like", "empty_like", "full_like")


class _NoStream(contextlib.AbstractContextManager):
    """Stands for a CUDA stream or event: work on a CPU is already in order."""

    def __init__(self, *_args, **_kwargs):
        pass

    def __exit__(self, *_exception):
        return False

    def _nothing(self, *_args, **_kwargs):
        return self

    wait_stream = wait_event = synchronize = record = wait = record_event = query = _nothing


def _not_cuda(value):
    """`value`, or the CPU where it names a CUDA device."""
    return _CPU if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value


def _answer_queries() -> None:
    def answer(value):  # a new function for each name: torch's tracer refuses one object under two names
        return lambda *_args, **_kwargs: value

    cuda = torch.cuda
    cuda.current_device = answer(_CPU)
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, answer(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, answer(0))
    cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    for name in ("Stream", "Event", "stream", "current_stream", "default_stream"):
        setattr(cuda, name, type(name, (_NoStream,), {}))


def _redirect_literals() -> None:
    def on_cpu(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if "device" in kwargs:
                kwargs["device"] = _not_cuda(kwargs["device"])
            return function(*map(_not_cuda, args), **kwargs)
        return call

    torch.utils._device._device_constructors()  # cached: `with torch.device(...)` must know the unwrapped ones
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.Tensor.to = on_cpu(torch.Tensor.to)
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    torch.nn.Module.cuda = lambda self, *_args, **_kwargs: self
    for name, dtype in (("FloatTensor", torch.float32), ("IntTensor", torch.int32), ("LongTensor", torch.int64)):
        setattr(torch.cuda, name, functools.partial(torch.tensor, dtype=dtype))


def _rename_types() -> None:
    tensor_type = torch.Tensor.type

    def type_(self, *args, **kwargs):
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.")  # what megatron.core compares with

    torch.Tensor.type = type_


@functools.cache
def install() -> None:
    """Prepare this process, once, so that `import megatron.core` works and trains on the CPU."""
    _answer_queries()
    _redirect_literals()
    _rename_types()


def install_rng(random_module) -> None:
    """Give `megatron.core.tensor_parallel.random` the CPU generator; call after it is imported."""
    random_module._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random_module._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)


def install_norm(clip_module) -> None:
    """Give `megatron.core.optimizer.clip_grads` a norm that does not lose digits.
    Its fallback adds up millions of fp32 squares one after another, which is off by 1e-5 and depends on how the
    tensors are split; sums of short rows in fp64 are exact to the last fp32 digit, and as quick."""
    def l2_norm(_chunk_size, _overflow, tensor_lists, _per_tensor):
        total = sum((_sum_of_squares(tensor) for tensors in tensor_lists for tensor in tensors),
                    start=torch.zeros((), dtype=torch.float64))
        return total.sqrt().float().view(1), None

    clip_module.l2_norm_impl = l2_norm


def _sum_of_squares(tensor: torch.Tensor, row: int = 1024) -> torch.Tensor:
    flat = tensor.reshape(-1)
    whole = flat.numel() // row * row
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, row), dim=1).double()
    return rows.square().sum() + torch.linalg.vector_norm(flat[whole:]).double().square()


def install_gathering(buffer_module) -> None:
    """Leave out the collectives of a data-parallel group of one rank, in place as they are. gloo copies gradients and
    parameters to itself there: 6 % of a step of 210M parameters."""
    def unless_alone(collective):
        @functools.wraps(collective)
        def call(output, source, *args, group=None, **kwargs):
            alone = group is not None and group.size() == 1 and output.data_ptr() == source.data_ptr()
            return None if alone else collective(output, source, *args, group=group, **kwargs)
        return call

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffer_module, name, unless_alone(getattr(buffer_module, name)))


@contextlib.contextmanager
def without_compilation():
    """`torch.compile` leaves functions as they are while this context is open."""
    compile_, torch.compile = torch.compile, lambda function, *_args, **_kwargs: function
    try:
        yield
    finally:
        torch.compile = compile_
