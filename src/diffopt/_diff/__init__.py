"""Derivatives of our own making: custom functions, gradients and captured tensors."""
