"""The benchmark suite: one file per workload, with the programs that compute it."""

from . import conv_maml, logistic, mlp_unroll, readme_maml, sine_maml
from .workload import Workload

WORKLOADS: dict[str, Workload] = {
    "conv_maml": conv_maml.WORKLOAD,
    "sine_maml": sine_maml.WORKLOAD,
    "mlp_unroll": mlp_unroll.WORKLOAD,
    "logistic": logistic.WORKLOAD,
    **{f"readme_{rule}": workload for rule, workload in readme_maml.WORKLOADS.items()},
}
"""By the names that the command line takes."""
