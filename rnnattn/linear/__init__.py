"""Linear recurrences, h = a ⊙ h₋ + b, and units made of them: minGRU, minLSTM, RG-LRU.

From what is called to what is computed: `api` (the functions, the choice of a schedule), `init`
(weights), `arguments` (checks), `rule` (the custom rule), the schedules `xla` and `native`,
`equations`.
"""

from rnnattn.linear.api import (
    linear_scan,
    mingru,
    mingru_step,
    minlstm,
    minlstm_step,
    rglru,
    rglru_step,
)
from rnnattn.linear.equations import MinGRUParams, MinLSTMParams, RGLRUParams
from rnnattn.linear.init import init_mingru, init_minlstm, init_rglru

__all__ = [
    "MinGRUParams",
    "MinLSTMParams",
    "RGLRUParams",
    "init_mingru",
    "init_minlstm",
    "init_rglru",
    "linear_scan",
    "mingru",
    "mingru_step",
    "minlstm",
    "minlstm_step",
    "rglru",
    "rglru_step",
]
