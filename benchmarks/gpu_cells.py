"""The measurements of `benchmarks/gpu.sh` that need the engine itself, each in a process of its own.

    echo '{"kind": "throughput", "preset": "610m", ...}' | python benchmarks/gpu_cells.py

prints one JSON object as its last line. A process a cell: what one leaves in the GPU's memory is no other's matter,
and running out of it is an answer. What has to be imported is, before the question is read.

    throughput    tokens/s, MFU, peak memory of our training step
    peer          the same model and batch in transformers under torch.compile
    specs         the loss and gradients of both layer specs on the same weights
    costs         where the time of a step goes: the largest kernels
"""

import gc
import json
import statistics
import sys
import time

import numpy as np

VOCABULARY, MASK_ID, RATIO = 128256, 128002, 0.4


class RandomDocuments:
    """Windows of random tokens; documents of lognormal length (median about 400 tokens), or none."""

    def __init__(self, length: int, vocabulary: int, isolated: bool):
        self.sequence_length, self.seed, self._vocabulary, self._isolated = length, 7, vocabulary, isolated

    def sample(self, index: int):
        """Window number `index`."""
        from megatron_encdec.data.samples import Sample

        draw = np.random.default_rng(index)
        tokens_S = draw.integers(8, self._vocabulary - 300, self.sequence_length)
        ends = np.cumsum(np.maximum(16, draw.lognormal(6.0, 1.0, self.sequence_length // 16)).astype(np.int64))
        ends = ends[ends < self.sequence_length] if self._isolated else ends[:0]
        return Sample(index, 0, 0, index, tokens_S, np.append(ends, self.sequence_length))


def objective_of(name: str):
    """`clm`, or `mlm` at 40 %."""
    from megatron_encdec.objectives.base import Objective

    return Objective.from_yaml({"mlm": f"mlm:{RATIO}"}.get(name, name), "objective")


def vocabulary_of(size: int):
    """Eight special tokens, and the mask."""
    from megatron_encdec.objectives.base import Vocabulary

    return Vocabulary(size, frozenset(range(8)), min(MASK_ID, size - 1))


def model_of(cell: dict):
    """The trunk's shape."""
    from megatron_encdec.model.config import ModelConfig

    return ModelConfig.from_yaml({"preset": cell["preset"], "vocabulary_size": cell.get("vocabulary", VOCABULARY),
                                  "layers": cell.get("layers", "auto")}, "model")


def dtype_of(cell: dict):
    """bf16 unless the cell says otherwise."""
    import torch

    return torch.float32 if cell.get("dtype") == "fp32" else torch.bfloat16


def trainer_of(cell: dict):
    """Our trainer as `pretrain` makes it."""
    from megatron_encdec.engine.boxes import make_fp8_state
    from megatron_encdec.engine.config import OptimizerSettings
    from megatron_encdec.engine.optimizer import build_optimizer, wrap
    from megatron_encdec.model.performance import PerformanceSettings
    from megatron_encdec.model.precision import PrecisionSettings
    from megatron_encdec.model.trunk import build_trunk
    from megatron_encdec.platform.distributed import initialize
    from megatron_encdec.training.step import Trainer

    performance, topology = PerformanceSettings(**cell.get("performance", {})), initialize()
    trunk = build_trunk(model_of(cell), topology, dtype_of(cell), cell["length"], 1, performance=performance,
                        precision=PrecisionSettings(cell.get("dtype", "bf16"), cell.get("fp8")))
    ddp = wrap(trunk)
    optimizer = build_optimizer(ddp, OptimizerSettings(lr=1e-4))
    make_fp8_state(trunk)
    return Trainer(ddp, optimizer, topology, vocabulary_of(model_of(cell).vocabulary_size),
                   performance.batches_ahead)


def windows_of(cell: dict, step: int) -> range:
    """The samples of a step."""
    windows = cell["micro"] * cell.get("micro_batches", 2)
    return range((step - 1) * windows, step * windows)


def throughput(cell: dict) -> dict:
    """Median over steps, after a warm-up."""
    import torch

    from megatron_encdec.model.flops import training_flops
    from megatron_encdec.platform.device import device_type, peak_flops
    from megatron_encdec.training.work import Work

    trainer, model = trainer_of(cell), model_of(cell)
    samples = RandomDocuments(cell["length"], model.vocabulary_size, cell.get("isolated", True))
    objective = objective_of(cell["objective"])
    tokens, seconds, flops, loss = len(windows_of(cell, 1)) * cell["length"], [], [], None
    for step in range(1, cell["warmup"] + cell["steps"] + 1):
        start = time.perf_counter()
        result = trainer.train_step(Work(samples, objective, windows_of(cell, step), cell["micro"]), 1e-4)
        if device_type() == "cuda":
            torch.cuda.synchronize()
        if step > cell["warmup"]:
            seconds.append(time.perf_counter() - start)
            flops.append(training_flops(model, tokens, result.pairs, result.targets))
            loss = result.loss
    median = statistics.median(seconds)
    rate = statistics.median(count / taken for count, taken in zip(flops, seconds, strict=True))
    memory = torch.cuda.max_memory_allocated() if device_type() == "cuda" else 0
    return {"tokens_per_second": tokens / median, "mfu": rate / peak_flops(dtype_of(cell)), "flops_per_second": rate,
            "flops_per_token": statistics.mean(flops) / tokens, "seconds_a_step": seconds, "loss": loss,
            "peak_memory_bytes": memory, "packed": trainer.trunk.packed,
            "layers": type(trainer.trunk.decoder.layers[0].mlp.linear_fc1).__name__}


def peer(cell: dict) -> dict:
    """transformers' class under torch.compile with `attention`, whole windows, fused AdamW on bf16 parameters.

    Where a micro-batch does not fit, with half as many windows in twice as many: the tokens of a step stay.
    """
    import torch

    micro, parts = cell["micro"], cell.get("micro_batches", 2)
    while True:
        try:
            return {**_peer(cell, micro, parts), "micro": micro}
        except torch.cuda.OutOfMemoryError:
            if micro % 2:
                raise
            micro, parts = micro // 2, 2 * parts
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _peer_model(cell: dict):
    """Llama for CLM, EuroBERT for MLM, of the trunk's shape."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM, LlamaConfig, LlamaForCausalLM

    from megatron_encdec.platform.device import device

    shape = model_of(cell)
    sizes = dict(vocab_size=shape.vocabulary_size, hidden_size=shape.hidden_size,
                 intermediate_size=shape.ffn_hidden_size, num_hidden_layers=shape.num_layers,
                 num_attention_heads=shape.num_attention_heads, num_key_value_heads=shape.num_query_groups,
                 max_position_embeddings=cell["length"], tie_word_embeddings=False, pad_token_id=0, bos_token_id=0,
                 eos_token_id=0, use_cache=False, attn_implementation=cell["attention"])
    causal = cell["objective"] == "clm"
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if causal else EuroBertForMaskedLM(EuroBertConfig(**sizes))
    return model.to(device(), dtype_of(cell)).train()


def _peer(cell: dict, micro: int, parts: int) -> dict:
    import torch

    from megatron_encdec.objectives.base import collate
    from megatron_encdec.platform.device import device, device_type

    shape, model, causal = model_of(cell), _peer_model(cell), cell["objective"] == "clm"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model) if cell["compile"] else model
    samples = RandomDocuments(cell["length"], shape.vocabulary_size, False)
    objective, vocabulary, seconds = objective_of(cell["objective"]), vocabulary_of(shape.vocabulary_size), []
    for step in range(cell["warmup"] + cell["steps"]):
        start = time.perf_counter()
        for number in range(parts):
            first = (step * parts + number) * micro
            batch = collate(objective, [samples.sample(first + i) for i in range(micro)], samples.seed, vocabulary)
            inputs = torch.from_numpy(batch.inputs_BS)
            labels = inputs.clone() if causal else torch.full((inputs.numel(),), -100)
            if not causal:
                labels[torch.from_numpy(batch.label_positions_N)] = torch.from_numpy(batch.labels_N)
            loss = compiled(input_ids=inputs.to(device()), labels=labels.view_as(inputs).to(device())).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()
        if step >= cell["warmup"]:
            seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": micro * parts * cell["length"] / statistics.median(seconds),
            "seconds_a_step": seconds, "loss": loss,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if device_type() == "cuda" else 0}


def specs(cell: dict) -> dict:
    """Loss and gradients of `layers` against the torch layers on masked windows in fp32, same weights and batch."""
    import torch

    from megatron_encdec.model.performance import PerformanceSettings
    from megatron_encdec.model.trunk import build_trunk
    from megatron_encdec.objectives.base import collate
    from megatron_encdec.platform.device import device
    from megatron_encdec.platform.distributed import initialize

    topology, found = initialize(), {}
    samples = RandomDocuments(cell["length"], cell["vocabulary"], True)
    batch = collate(objective_of(cell["objective"]), [samples.sample(i) for i in range(cell["micro"])], 7,
                    vocabulary_of(cell["vocabulary"]))
    inputs, cuts, positions, labels = (torch.from_numpy(array).to(device()) for array in (
        batch.inputs_BS, batch.cu_seqlens, batch.label_positions_N, batch.labels_N))
    ways = {"reference": ("torch", torch.float32, "masked"), "torch": ("torch", torch.bfloat16, None),
            **({"transformer_engine": ("transformer_engine", torch.bfloat16, None)} if cell["te"] else {})}
    for name, (layers, dtype, attention) in ways.items():
        trunk = build_trunk(model_of({**cell, "layers": layers}), topology, dtype, cell["length"], 1,
                            performance=PerformanceSettings(attention=attention, fuse_gradients=False))
        context = trunk.attention_context(batch.attention, cuts, batch.longest, batch.isolated, *inputs.shape)
        total = trunk(inputs, context, positions, labels, summed=True)
        total.backward()
        gradients = torch.cat([parameter.grad.float().flatten() for key, parameter in sorted(
            trunk.named_parameters(), key=lambda pair: canonical(pair[0]))])
        found[name] = (total.item() / len(labels), gradients.cpu())
        del trunk
    loss, gradient = found["reference"]
    return {name: {"loss": value, "loss_error": abs(value / loss - 1),
                   "gradient_error": float((one - gradient).norm() / gradient.norm())}
            for name, (value, one) in found.items()}


def canonical(name: str) -> str:
    """A parameter's name as Transformer Engine's layers have it."""
    from megatron_encdec.model.layers import TORCH_KEYS

    for ours, theirs in TORCH_KEYS.items():
        name = name.replace(ours, theirs)
    return name


def costs(cell: dict) -> dict:
    """The kernels that take most of a step, how long the GPU had none, and a trace of the step in cell["trace"]."""
    import torch

    from megatron_encdec.platform.device import device_type
    from megatron_encdec.training.work import Work

    trainer, model = trainer_of(cell), model_of(cell)
    samples = RandomDocuments(cell["length"], model.vocabulary_size, True)
    objective = objective_of(cell["objective"])
    for step in (1, 2, 3):
        trainer.train_step(Work(samples, objective, windows_of(cell, step), cell["micro"]), 1e-4)
    on_gpu = device_type() == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as profile:
        start = time.perf_counter()
        trainer.train_step(Work(samples, objective, windows_of(cell, 4), cell["micro"]), 1e-4)
        if on_gpu:
            torch.cuda.synchronize()
        wall = 1e6 * (time.perf_counter() - start)
    profile.export_chrome_trace(cell["trace"])
    kernels = [event for event in profile.key_averages()
               if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA]
    averages = [(event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
                for event in kernels]
    total = sum(taken for _, taken, _ in averages) or 1
    largest = sorted(averages, key=lambda row: -row[1])[:30]
    return {"microseconds": total, "wall_microseconds": wall, "kernels": sum(count for *_, count in averages),
            "largest": [{"name": name[:160], "share": taken / total, "count": count}
                        for name, taken, count in largest]}


def prepare() -> None:
    """What most measurements import."""
    import megatron_encdec.model.trunk
    import megatron_encdec.training.step  # noqa: F401


if __name__ == "__main__":
    prepare()
    asked = json.loads(sys.stdin.read())
    answer = {"throughput": throughput, "peer": peer, "specs": specs, "costs": costs}[asked["kind"]](asked)
    print("\n" + json.dumps(answer), flush=True)
