"""Custom derivatives: autograd functions, gradients of losses, captured tensors, constants."""
