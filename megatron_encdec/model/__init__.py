"""The trunk: one GPTModel for every objective, its layers, its head, its initial weights, its FLOP count."""
