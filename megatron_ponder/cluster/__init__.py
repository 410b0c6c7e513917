"""Jobs on a SLURM cluster: what a cluster looks like, the scripts that are submitted, torchrun inside them."""
