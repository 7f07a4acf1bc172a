"""Exported encoders to scores: fine-tuning on NeMo AutoModel, sweeps of learning rates and seeds (arXiv 2507.00994).

config -> cells -> sweep -> run_one(cell) -> results.json. One run: `readers` (files, the hub) or `embedded`
(docstrings) -> `examples` -> `features` -> a NeMo recipe (`recipes`) around an encoder with its head (`models`) ->
`metrics`.
"""
