# %% [markdown]
# # From text to an encoder, in Python
#
# The cells do what the command line does, with `megatron_encdec` imported: text to tokens, a run with two phases, a
# branch of it, an encoder, embeddings. Run it from the repository's folder, cell by cell in an editor that knows
# `# %%`, or as a whole: `python examples/notebook.py`. It takes less than a minute on two CPU cores, and no download.
# The text is this project's own documentation: enough to see every step work, far too little for a good model.

# %%
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from megatron_encdec import UserError, dry_run, export, load_run, preprocess, pretrain

work = Path("work_dirs/notebook")  # everything goes there; delete it to begin again

# %% [markdown]
# ## Text to tokens
# Every text file is a document. A tokenizer of 1,024 entries is trained first; a tenth of the documents is set aside.

# %%
data = preprocess("docs", work / "tokenizer", work / "data/docs", train_tokenizer=1024, validation_percent=10)
print(data)

# %% [markdown]
# ## A config
# The same keys as in a YAML file (docs/config.md has all of them). Two phases: next-token prediction, then masks.

# %%
config = {
    "run": {"dir": str(work / "run")},
    "tokenizer": {"path": str(work / "tokenizer")},
    "data": {"train": [{"path": str(work / "data/docs")}], "validation": [{"path": str(work / "data/docs.validation")}],
             "sequence_length": 128},
    "model": {"preset": "tiny", "num_layers": 2},
    "phases": [{"name": "clm", "objective": "clm", "steps": 20}, {"name": "mlm", "objective": "mlm:0.3", "steps": 20}],
    "optimizer": {"lr": 3e-3},
    "schedule": {"name": "wsd", "warmup_steps": 5, "decay_steps": 10},
    "batch": {"global_size": 8, "micro_size": 8},
    "evaluation": {"every": 20, "batches": 1},
}
print("\n".join(dry_run(config).splitlines()[-8:]))  # what it comes to; nothing is trained

# %% [markdown]
# ## Training
# The same call again would find nothing left to do; after an interruption it goes on, to the last bit.

# %%
run = pretrain(config)
print(run)

# %%
for line in run.metrics("eval"):
    print(line["step"], line["phase"], line["losses"])

# %% [markdown]
# ## A branch
# The same first phase, another mask ratio after it. Only the steps after the switch are computed.

# %%
changes = {"run.dir": str(work / "branch"), "phases.1.objective": "mlm:0.15"}
branch = pretrain(config, changes, fork=f"{run.directory}@20")
print(repr(branch), "forked from step", branch.parent["step"])

# %% [markdown]
# ## A mistake is an exception
# It says the key, the value and a way out; nothing is half made.

# %%
try:
    pretrain(config, {"run.dir": str(work / "other"), "schedule.warmup": 5})
except UserError as error:
    print(error)

# %% [markdown]
# ## The encoder
# A stock Hugging Face model, compared with the run's own weights when it is written.

# %%
encoder = export(run.directory, work / "encoder", force=True)
print(encoder)

# %% [markdown]
# ## Embeddings
# One vector for each text: the mean over its tokens, padding left out.

# %%
texts = ["A run is a list of phases.", "Checkpoints are written beside training.", "Masks hide tokens."]
tokenizer, model = AutoTokenizer.from_pretrained(encoder.path), AutoModel.from_pretrained(encoder.path)
batch = tokenizer(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"][..., None]
embeddings = (hidden * mask).sum(1) / mask.sum(1)
print(embeddings.shape)

# %% [markdown]
# ## Later
# Any run can be looked at again, also while it is going on elsewhere.

# %%
print(repr(load_run(work / "run")), "checkpoints of steps", load_run(work / "run").checkpoints)
