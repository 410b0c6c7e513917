"""What there is of every parameter: the weight, and what the optimiser remembers of it.

Checkpoints name their tensors by these kinds, the engine hands them over by kind, and estimates count their bytes. Read
without PyTorch.
"""

# The master weight, which is fp32 in every precision.
WEIGHT = "weight"
WEIGHT_BYTES = 4
# AdamW's averages of the gradient and of its square, by their names in PyTorch: bytes a parameter.
MOMENTS = {"exp_avg": 4, "exp_avg_sq": 4}
KINDS = (WEIGHT, *MOMENTS)
