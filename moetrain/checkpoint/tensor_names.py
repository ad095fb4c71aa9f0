"""Names of tensors that older releases saved under others. A checkpoint is read as if it had today's names.

A checkpoint says by which naming it was written, in the fact `names`. Without it, that is the first one:

    naming 1    matrices of attention and of dense networks were parameters by themselves: ….attention.qkv
    naming 2    each is the weight of a projection, which may have a bias, too: ….attention.qkv.weight

Expert matrices keep their names. This file imports no torch.
"""

import re

NAMING = 2
# Stored name by the naming before, and what today's has between the groups.
_FIRST = re.compile(r"((?:model|optim)\.layers\.\d+\."
                    r"(?:attention\.(?:qkv|out)|(?:ffn|moe\.shared)\.(?:gate_up|down)))"
                    r"((?:\.(?:exp_avg|exp_avg_sq|momentum_buffer))?)")


def current_name(stored: str, naming: int) -> str:
    """Today's name of a tensor that was saved under the name `stored`.

    Args:
        stored: name in the checkpoint.
        naming: by which the checkpoint was written.
    """
    found = _FIRST.fullmatch(stored) if naming == 1 else None
    return stored if found is None else f"{found[1]}.weight{found[2]}"
