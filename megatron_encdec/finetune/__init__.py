"""Exported encoders to scores: fine-tuning on NeMo AutoModel, sweeps of learning rates and seeds (arXiv 2507.00994).

config -> runs -> sweep -> run_one(run) -> the tree of results, which `study` reads. One run: `rows` (files, the hub) ->
`examples` -> `features` -> a NeMo recipe (`recipes`) around an encoder with its head (`models`) -> `metrics`.
"""
