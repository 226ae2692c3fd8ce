"""Ways of differentiating an inner loop, one file each."""

from diffopt.adjoint._base import Adjoint as Adjoint, GradientStep as GradientStep
from diffopt.adjoint._unroll import unroll as unroll
from diffopt.adjoint.checkpointed import Checkpointed as Checkpointed
from diffopt.adjoint.truncated import Truncated as Truncated
from diffopt.adjoint.unrolled import FirstOrder as FirstOrder, Unrolled as Unrolled
