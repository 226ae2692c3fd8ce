"""Ways of differentiating an inner loop, one file each."""

from diffopt.adjoint._base import Adjoint as Adjoint
from diffopt.adjoint.truncated import Truncated as Truncated
from diffopt.adjoint.unrolled import FirstOrder as FirstOrder, Unrolled as Unrolled
