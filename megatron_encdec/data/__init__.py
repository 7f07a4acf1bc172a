"""From tokens on disk to ordered samples: `store` -> `order` -> `samples`. Pure numpy, no torch.

Sample i of a run is a function of the data's fingerprints, their weights, data.seed and the window settings: no index
files, no state to save but the number of samples consumed.
"""
