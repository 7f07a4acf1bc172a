"""One step of retrieval: ours (cached gradients) beside that of NeMo's TrainBiEncoderRecipe, same encoder and texts.

    .venv-nemo/bin/python benchmarks/retrieval_step.py [--pairs 32] [--length 256] [--hidden 128] [--layers 4]
                                                  [--micro 4]

Each side is a process of its own. Both train on the same pairs of random tokens, every one of full length:

    nemo, all at once         its `_forward_backward_step` on one micro-batch of all pairs
    nemo, accumulated         the same on micro-batches of --micro pairs: a query meets the documents of its own alone
    ours                      micro-batches of --micro pairs: a query meets the documents of all pairs

Prints for each how many negatives a query has, the largest memory beyond that of the loaded model, CPU seconds,
the loss, and the cosine between its gradient and that of `nemo, all at once`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import types

import torch
import torch.nn.functional as F
from transformers import EuroBertConfig, EuroBertModel

TEMPERATURE, VOCABULARY = 0.05, 8192


class BiEncoder(torch.nn.Module):
    """What both sides embed with; the attributes are those that NeMo's step reads."""

    do_distributed_inbatch_negative, l2_normalize, pooling = True, True, "avg"

    def __init__(self, arguments):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = EuroBertModel(EuroBertConfig(
            vocab_size=VOCABULARY, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
            num_hidden_layers=arguments.layers, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
            bos_token_id=0, eos_token_id=0, mask_token_id=0, max_position_embeddings=arguments.length))

    def forward(self, batch: dict) -> torch.Tensor:
        """[B, H], of unit length."""
        hidden = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return F.normalize(hidden.mean(1), dim=-1)


def nemo(model, queries, documents, micro: int) -> float:
    """Gradients by NeMo's own method; the loss."""
    from nemo_automodel.recipes.retrieval.train_bi_encoder import TrainBiEncoderRecipe

    recipe = TrainBiEncoderRecipe.__new__(TrainBiEncoderRecipe)
    recipe.__dict__.update(dist_env=types.SimpleNamespace(device=torch.device("cpu")), model_parts=[model],
                           distributed_config=None, train_n_passages=1, temperature=TEMPERATURE)
    losses = []
    parts = list(zip(queries.split(micro), documents.split(micro), strict=True))
    for number, (query, document) in enumerate(parts):
        batch = {"q_input_ids": query, "q_attention_mask": torch.ones_like(query), "d_input_ids": document,
                 "d_attention_mask": torch.ones_like(document)}
        recipe._forward_backward_step(number, batch, loss_buffer=losses, num_batches=len(parts))
    return float(torch.stack(losses).mean())


def ours(model, queries, documents, micro: int) -> float:
    """Gradients by the recipe of megatron_encdec; the loss."""
    from megatron_encdec.finetune.recipes import Retrieval

    recipe = Retrieval.__new__(Retrieval)
    training = types.SimpleNamespace(retrieval_micro_batch_size=micro, temperature=TEMPERATURE)
    recipe.__dict__.update(
        dist_env=types.SimpleNamespace(device=torch.device("cpu"), world_size=1, rank=0), model_parts=[model],
        run=types.SimpleNamespace(training=training), task=types.SimpleNamespace(collate=lambda batch: batch),
        masked_in_step=0, _dp_allreduce=lambda value: value,
        _embed=lambda model, ids, mask: model({"input_ids": ids, "attention_mask": mask}))
    numbers = torch.arange(len(queries))

    class Pairs(dict):
        def __len__(self):
            return len(queries)

    batch = Pairs(input_ids=queries, attention_mask=torch.ones_like(queries), document_input_ids=documents,
                  document_attention_mask=torch.ones_like(documents), document=numbers, positives=numbers[:, None])
    return float(recipe._backward(batch, 1 / len(queries))) / len(queries)


SIDES = {"nemo, all at once": (nemo, False), "nemo, accumulated": (nemo, True), "ours": (ours, True)}


def one_side(arguments) -> dict:
    """A step of a side, in this process."""
    step, accumulate = SIDES[arguments.side]
    micro = arguments.micro if accumulate else arguments.pairs
    torch.set_num_threads(1)
    model = BiEncoder(arguments)
    draw = torch.Generator().manual_seed(1)
    queries, documents = (torch.randint(1, VOCABULARY, (arguments.pairs, arguments.length), generator=draw)
                          for _ in range(2))
    step(model, queries[:1, :8], documents[:1, :8], 1)  # imports, and gradients of the size they will have
    model.zero_grad(set_to_none=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    loss = step(model, queries, documents, micro)
    seconds = time.process_time() - began
    torch.save(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), arguments.gradient)
    return {"loss": loss, "seconds": seconds, "negatives": (micro if step is nemo else arguments.pairs) - 1,
            "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("pairs", 32), ("length", 256), ("hidden", 128), ("layers", 4), ("micro", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(one_side(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        exact = None
        for side in SIDES:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side, "--gradient",
                                   f"{folder}/gradient.pt"], stdout=subprocess.PIPE, text=True, check=True)
            found, gradient = json.loads(done.stdout.splitlines()[-1]), torch.load(f"{folder}/gradient.pt")
            exact = gradient if exact is None else exact
            print(f"{side:18} {found['negatives']:3} negatives a query, {found['megabytes']:7.0f} MB, "
                  f"{found['seconds']:6.1f} s of CPU, loss {found['loss']:.4f}, cosine of gradients "
                  f"{float(F.cosine_similarity(gradient.double(), exact.double(), dim=0)):.4f}", flush=True)


if __name__ == "__main__":
    main()
