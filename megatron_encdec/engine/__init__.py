"""The engine under the phases: optimizer, learning-rate schedule, checkpoints."""
