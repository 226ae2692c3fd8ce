"""Linear solvers for operators given by matrix-vector products."""

from diffopt.linear._base import (
    LinearSolver as LinearSolver,
    LinearSystem as LinearSystem,
    Run as Run,
)
from diffopt.linear._derivative import LinearSolution as LinearSolution
from diffopt.linear._failure import (
    ConvergenceError as ConvergenceError,
    ConvergenceWarning as ConvergenceWarning,
)
from diffopt.linear._vectors import anywhere as anywhere
from diffopt.linear.direct import Direct as Direct, Nystrom as Nystrom
from diffopt.linear.krylov import (
    GMRES as GMRES,
    BiCGStab as BiCGStab,
    ConjugateGradient as ConjugateGradient,
    NormalCG as NormalCG,
)
from diffopt.linear.series import Neumann as Neumann
