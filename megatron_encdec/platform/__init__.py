"""Ground floor: errors, typed configs, process groups, devices, and everything that names `megatron.core`."""
