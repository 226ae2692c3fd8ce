"""Running a rule, the mathematics of one tensor, on trees and on parameter groups."""
