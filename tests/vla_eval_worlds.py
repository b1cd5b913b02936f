"""Meta-World as a benchmark of vla-eval, which ships none: `vla-eval run` finds it by
`vla_eval_worlds:MetaWorldBenchmark`.
"""

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW, DimSpec

from vla0.sim.metaworld import FIRST_SEED, MetaWorldEnv

TASKS = ("button-press-topdown-v3", "drawer-close-v3", "window-close-v3")


class MetaWorldBenchmark(StepBenchmark):
    """The demo's world: its camera, its rate, the hand starting above the table."""

    def __init__(self, tasks=TASKS, fps: float = 40.0, max_steps: int = 150):
        super().__init__()
        self.tasks, self.fps, self.max_steps, self.env, self.task = (
            list(tasks),
            fps,
            max_steps,
            None,
            None,
        )

    def get_tasks(self):
        return [{"name": task, "suite": "metaworld"} for task in self.tasks]

    def reset(self, task):
        if self.task != task["name"]:
            self.cleanup()
            self.env, self.task = (
                MetaWorldEnv(task["name"], start="above", fps=self.fps),
                task["name"],
            )
        return self.env.reset(FIRST_SEED + task["episode_idx"])

    def step(self, action):
        seen, done = self.env.step(np.asarray(action["actions"], np.float32))
        return StepResult(seen, float(done), done, {})

    def make_obs(self, raw_obs, task):
        return {
            "images": {"view": raw_obs.images["front"]},
            "task_description": raw_obs.instruction,
            "state": raw_obs.state,
        }

    def get_step_result(self, step_result):
        return {"success": bool(step_result.done)}

    def get_metadata(self):
        return {"max_steps": self.max_steps}

    def get_action_spec(self):
        return {"actions": DimSpec("actions", 4, "raw", (-1, 1))}

    def get_observation_spec(self):
        return {"view": IMAGE_RGB, "language": LANGUAGE, "state": RAW}

    def cleanup(self):
        if self.env is not None:
            self.env.close()
