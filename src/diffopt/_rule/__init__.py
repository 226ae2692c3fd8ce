"""How one rule, the mathematics of one tensor, is run on trees and on parameter groups."""
