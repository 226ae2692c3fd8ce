"""Derivatives of our own making: custom functions, gradients, captured tensors, constants."""
