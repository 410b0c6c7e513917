"""What runs on GPUs, in Triton; imported by the launchers beside this folder when they first launch, and not before"""
