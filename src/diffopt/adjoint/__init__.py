"""Ways of differentiating an inner loop, one file each, and `unroll` for loops of any step."""

from diffopt.adjoint._base import Adjoint as Adjoint, GradientStep as GradientStep
from diffopt.adjoint._unroll import unroll as unroll
from diffopt.adjoint.checkpointed import Checkpointed as Checkpointed
from diffopt.adjoint.evolution import Evolution as Evolution
from diffopt.adjoint.forward_mode import ForwardMode as ForwardMode
from diffopt.adjoint.implicit import Implicit as Implicit
from diffopt.adjoint.one_step import OneStep as OneStep
from diffopt.adjoint.persistent_evolution import PersistentEvolution as PersistentEvolution
from diffopt.adjoint.reversible import Reversible as Reversible
from diffopt.adjoint.smoothing import smooth as smooth
from diffopt.adjoint.truncated import Truncated as Truncated
from diffopt.adjoint.unrolled import FirstOrder as FirstOrder, Unrolled as Unrolled
