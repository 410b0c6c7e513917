"""Attention, the loss, norms: what is computed otherwise than by composing PyTorch's operations, and by which kernel"""
