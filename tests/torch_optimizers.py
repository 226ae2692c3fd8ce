"""torch's list of optimizer configurations, without its list of operators, which takes seconds."""

import sys
from unittest import mock

OPERATORS = "torch.testing._internal.common_methods_invocations"

absent = sys.modules.setdefault(OPERATORS, mock.MagicMock())
from torch.testing._internal.common_optimizers import (  # noqa: E402
    OptimizerErrorEnum as OptimizerErrorEnum,
    optim_db as optim_db,
)

if isinstance(absent, mock.MagicMock):
    del sys.modules[OPERATORS]
