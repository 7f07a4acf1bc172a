"""Training: the config of a run, its plan of phases, the step, the loop, evaluation."""
