"""ExPO with a reward model: one parameter of a merge, chosen by the rewards of its responses."""

from pipelines.expo.config import ExpoConfig
from pipelines.expo.plan import ExpoPlan, plan_expo
from pipelines.expo.run import expo, finished

__all__ = ["ExpoConfig", "ExpoPlan", "expo", "finished", "plan_expo"]
