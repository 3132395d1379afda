"""Promotes a space: makes it the one that readers use, if it passes its gates."""

from __future__ import annotations

from collections.abc import Callable

from embed_assets.lake.generations import Change, record_change
from embed_assets.lake.spaces import Promotion, Signature, Spaces
from embed_assets.lake.tables import Lake
from embed_assets.stages.gates import Trial, judge


def promote(
    lake: Lake,
    spaces: Spaces,
    trial: Trial,
    signed: Signature,
    on_gate: Callable[[str], None] = lambda name: None,
) -> Promotion:
    """Make the space on trial the active one if all its gates pass.

    `on_gate` is called with the name of each gate before it is evaluated. Raises ``LakeError`` if another process
    changed the active space since `spaces` were read.
    """
    lake.require_writable()
    wanted = trial.space
    if wanted == spaces.generations.active:
        return Promotion(wanted, spaces.previous, spaces.generations.gates_of(wanted))
    gates = judge(trial, on_gate)
    if any(not gate.passed for gate in gates):
        return Promotion(spaces.active, spaces.previous, gates)
    previous = spaces.active if spaces.active != wanted else spaces.previous
    change = Change("promoted", wanted, wanted, previous, signed.changed_by, signed.reason, tuple(gates))
    record_change(lake, spaces.generations, change)
    return Promotion(wanted, previous, gates)
