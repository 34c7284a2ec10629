"""What an engine client tells besides the core's own messages: a core was lost, one is back.

These never cross a wire: a supervisor (engine/supervisor.py) makes them on the client's side.
"""

from dataclasses import dataclass

from jaxinfer.core.messages import EngineInfo, EngineStats


@dataclass(frozen=True, kw_only=True)
class CoreLost:
    """The core is gone with all its requests; another one is being started."""

    reason: str  # one line, for users
    stats: EngineStats  # what to show meanwhile: the totals so far, nothing running


@dataclass(frozen=True, kw_only=True)
class CoreBack:
    """A new core serves. Its figures may differ from the lost one's (memory was free or not)."""

    info: EngineInfo
    stats: EngineStats


SupervisionEvent = CoreLost | CoreBack
