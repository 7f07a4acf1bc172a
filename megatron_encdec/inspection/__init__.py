"""Looking into what the other rooms made: token files, runs, checkpoints. Reads only, changes nothing."""
