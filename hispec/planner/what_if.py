"""What a checkpoint's settings would do on other hardware, or at the shape of another model.

Counts are the checkpoint's own, by replay: how many drafts are accepted is what was measured on it.
Seconds are those of a device model. So it is a simulation, and no plan.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hispec.planner.device_model import DeviceModel, SimulatedCosts
from hispec.planner.plan_file import Setting, Tried, is_plain
from hispec.planner.planner import Planner
from hispec.planner.replay import can_replay
from hispec.utils.console import Progress
from hispec.utils.files import write_json

SIMULATED = "simulated.json"


@dataclass
class Simulation:
    """All settings of a checkpoint by a device model."""

    device_model: DeviceModel
    rows: int
    depths: dict[int, int]
    """For each of the checkpoint's depths, the other model's."""
    text: dict[str, Any]
    """The prompts, see `plan_file.Text`."""
    settings: list[Tried]
    """Simulated tokens per second, of all rows together, fastest first. The ladders are those of
    the other model; `measured` is None."""
    left_out: int
    """Settings that cannot be replayed."""

    @property
    def plain(self) -> Tried:
        """Plain decoding."""
        return next(tried for tried in self.settings if is_plain(tried.setting))

    def best_of(self, rungs: int) -> Tried | None:
        """The fastest setting with so many rungs, what drafts without a model not counted among
        them; None without one."""
        fits = (t for t in self.settings if len(t.setting["ladder"]) == rungs)
        return next((t for t in fits if not is_plain(t.setting)), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON. No version of `plan_file.parse` takes it for a plan."""
        plain = self.plain.predicted
        settings = [
            {
                "setting": tried.setting,
                "simulated_tokens_per_second": tried.predicted,
                "over_plain": tried.predicted / plain,
                "tokens_per_target_pass": tried.tokens_per_target_pass,
                "prompts": tried.prompts,
            }
            for tried in self.settings
        ]
        return {
            "simulated": True,
            "device_model": asdict(self.device_model),
            "rows": self.rows,
            "depths": self.depths,
            "text": self.text,
            "left_out": self.left_out,
            "settings": settings,
        }

    def save(self, folder: Path) -> Path:
        """Write `simulated.json`, whole or not at all."""
        path = folder / SIMULATED
        write_json(path, self.as_dict())
        return path


def simulate(
    planner: Planner,
    device: DeviceModel,
    text: dict[str, Any],
    progress: Progress = lambda things, _: things,
) -> Simulation:
    """Replay every setting of a planner with the costs of a device model.

    Args:
        text: says what the prompts are.

    Raises:
        ValueError: two of the planner's depths stand for the same depth of the other model.
    """
    model = planner.model
    depths = [*planner.exits, model.num_layers]
    costs = SimulatedCosts(device, model, depths, planner.rows)
    fits = [s for s in planner.settings if can_replay(model, s["ladder"])]
    left_out = len(planner.settings) - len(fits)
    planner.settings = fits
    tried = planner.predict(costs, costs.prefill, progress)

    def there(setting: Setting) -> Setting:
        return {**setting, "ladder": [costs.depth_of[depth] for depth in setting["ladder"]]}

    found = [replace(entry, setting=there(entry.setting)) for entry in tried]
    found.sort(key=lambda entry: -entry.predicted)
    used = {depth: costs.depth_of[depth] for depth in depths}
    return Simulation(device, planner.rows, used, planner.text(text), found, left_out)
