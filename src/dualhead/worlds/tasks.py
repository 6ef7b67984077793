"""Small Gymnasium environments that cannot be solved without memory.

Importing this module registers them:

    dualhead/CartPoleNoVel-v1   balance a pole without seeing velocities; at most 500 steps
    dualhead/PendulumNoVel-v1   swing a pendulum up without seeing its velocity; 200 steps
    dualhead/MountainCarContinuousNoVel-v0   drive up a hill without seeing the velocity; at most 999 steps
    dualhead/RecallCue-v0       name a cue after 20 steps of noise, and go to the side it was shown on
    dualhead/RecallCue5-v0      the same after 5 steps of noise
    dualhead/RecallCue100-v0    the same after 100 steps of noise

`gymnasium.make("dualhead.worlds.tasks:dualhead/RecallCue-v0")` imports and makes in one call, in any process.
"""

from collections.abc import Mapping
from operator import index
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.continuous_mountain_car import Continuous_MountainCarEnv
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

SIDES = ("left", "right")


class CartPoleNoVel(CartPoleEnv):
    """Gymnasium's CartPole with the velocities hidden; all else is CartPole's, arguments included.

    Observation: float32 [2]: cart position (track units, ±4.8), pole angle (radians, ±0.418).
    """

    def __init__(self, sutton_barto_reward: bool = False, render_mode: str | None = None) -> None:
        super().__init__(sutton_barto_reward=sutton_barto_reward, render_mode=render_mode)
        full = self.observation_space
        assert isinstance(full, spaces.Box)
        self.observation_space = spaces.Box(full.low[::2], full.high[::2], dtype=np.float32)

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation[::2], reward, terminated, truncated, info  # a view of an array made for this step

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        return observation[::2], info


class PendulumNoVel(PendulumEnv):
    """Gymnasium's Pendulum with the velocity hidden; all else is Pendulum's, arguments included.

    Observation: float32 [2]: cosine and sine of the angle, 0 rad is upright.
    """

    def __init__(self, render_mode: str | None = None, g: float = 10.0) -> None:
        super().__init__(render_mode=render_mode, g=g)
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def _get_obs(self) -> NDArray[np.float32]:
        return super()._get_obs()[:2]


class MountainCarContinuousNoVel(Continuous_MountainCarEnv):
    """Gymnasium's continuous MountainCar with the velocity hidden; all else is MountainCar's, arguments included.

    Observation: float32 [1]: position, from -1.2 to 0.6; the goal is at 0.45.
    """

    def __init__(self, render_mode: str | None = None, goal_velocity: float = 0) -> None:
        super().__init__(render_mode=render_mode, goal_velocity=goal_velocity)
        full = self.observation_space
        assert isinstance(full, spaces.Box)
        self.observation_space = spaces.Box(full.low[:1], full.high[:1], dtype=np.float32)

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation[:1], reward, terminated, truncated, info  # a view of `state`, which is replaced each step

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        return observation[:1], info


class RecallCue(gym.Env[NDArray[np.float32], dict[str, Any]]):
    """Recall a cue and its side after a delay: one head names the cue, the other goes to the side.

    An episode has `delay + 2` steps: the cue, `delay` steps of noise, and "go". Only the action at go counts.

    Observation: float32 [num_cues + 3] within [-1, 1]. Noise is uniform on [-1, 1).

        channels       cue step                   delay    go       after the end
        [:num_cues]    one-hot cue                noise    noise    0
        [-3]           side: -1 left, +1 right    noise    noise    0
        [-2] is cue    1                          0        0        0
        [-1] is go     0                          0        1        0

    Action: Dict(where=Discrete(2), what=Discrete(num_cues)), integers; where is 0 for left, 1 for right.
    Reward: at go, 0.5 if `where` is the cue's side plus 0.5 if `what` is the cue; 0 at every other step.
    Ends: terminated by the action at go; never truncated.

    Cue and side are uniform and independent of the noise, so the most a policy without memory can expect is

        chance = 0.5 · 1/2 + 0.5 · 1/num_cues        (0.375 for four cues; with memory: 1)

    Args:
        delay: noise steps between cue and go, at least 0.
        num_cues: how many cues there are, at least 2.
        render_mode: None, "ansi" (one line) or "rgb_array" (uint8 [48, 16·(num_cues + 3), 3], rows from
            the top: what the agent sees, what it should answer, its answer in green if right, red if wrong).

    Raises:
        ValueError: an argument or an action is out of range.
        TypeError: an action is not a mapping of exactly these two keys to integers. It is checked at every step.
        ResetNeeded: a step without a running episode.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(self, delay: int = 20, num_cues: int = 4, render_mode: str | None = None) -> None:
        for name, value, least in (("delay", delay, 0), ("num_cues", num_cues, 2)):
            if not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode must be None or one of {self.metadata['render_modes']}, got {render_mode!r}")
        self.delay = int(delay)
        self.num_cues = int(num_cues)
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-1.0, 1.0, (self.num_cues + 3,), np.float32)
        # Keywords keep this order; a dict argument would be sorted.
        self.action_space = spaces.Dict(where=spaces.Discrete(2), what=spaces.Discrete(self.num_cues))
        self._go_time = self.delay + 1
        self._time = self._go_time + 1  # past go: no episode is running
        self._observations = np.zeros((0, self.num_cues + 3), np.float32)
        self._cue = self._side = 0
        self._answer: tuple[int, int] | None = None

    @property
    def chance(self) -> float:
        """The greatest expected return of a policy without memory: 1/4 + 1/(2 num_cues)."""
        return 0.25 + 0.5 / self.num_cues

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draws cue, side and all the noise of an episode; `options` are ignored."""
        super().reset(seed=seed)
        rng, num_cues = self.np_random, self.num_cues
        self._side, self._cue = divmod(int(rng.integers(2 * num_cues)), num_cues)
        # A step returns its own row of an array made for this episode, so observations may be kept.
        self._observations = observations = np.zeros((self.delay + 3, num_cues + 3), np.float32)
        observations[0, self._cue] = 1.0
        observations[0, -3:-1] = 2 * self._side - 1, 1.0
        observations[1:-1, :-2] = 2 * rng.random((self.delay + 1, num_cues + 1), np.float32) - 1
        observations[-2, -1] = 1.0
        self._time, self._answer = 0, None
        return observations[0], {}

    def step(self, action: Mapping[str, Any]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if self._time > self._go_time:
            raise ResetNeeded("RecallCue.step() needs a running episode: call reset() first, and after termination")
        try:
            where, what = index(action["where"]), index(action["what"])
        except (TypeError, KeyError, IndexError):
            where = None
        if where is None or len(action) != 2:
            raise TypeError(f"action must be a dict of two integers, 'where' and 'what', got {action!r}")
        if not (0 <= where < 2 and 0 <= what < self.num_cues):
            raise ValueError(
                f"where must be in [0, 2) and what in [0, {self.num_cues}), got where={where}, what={what}"
            )
        self._time += 1
        observation = self._observations[self._time]
        if self._time <= self._go_time:
            return observation, 0.0, False, False, {}
        self._answer = (where, what)
        return observation, 0.5 * (where == self._side) + 0.5 * (what == self._cue), True, False, {}

    def render(self) -> str | NDArray[np.uint8] | None:
        """The present phase as a line of text or a picture; None, with a warning, without a `render_mode`."""
        if self.render_mode is None:
            gym.logger.warn("RecallCue.render() needs render_mode 'ansi' or 'rgb_array' when it is made")
            return None
        if not len(self._observations):
            raise ResetNeeded("RecallCue.render() needs an episode: call reset() first")
        return self._text() if self.render_mode == "ansi" else self._picture()

    def _text(self) -> str:
        wanted = f"{SIDES[self._side]} {self._cue}"
        if self._answer is not None:
            where, what = self._answer
            return f"answered {SIDES[where]} {what}, wanted {wanted}"
        if self._time == 0:
            return f"cue: {wanted}"
        return f"delay {self._time}/{self.delay}" if self._time < self._go_time else "go"

    def _picture(self) -> NDArray[np.uint8]:
        cell, num_cues = 16, self.num_cues  # pixels; a multiple of 16 because video encoders want one
        picture = np.zeros((3 * cell, cell * (num_cues + 3), 3), np.uint8)
        grey = (127.5 * (self._observations[self._time] + 1)).astype(np.uint8)
        picture[:cell] = np.repeat(grey, cell)[:, None]

        def paint(row: int, where: int, what: int, side_colour: Any, cue_colour: Any) -> None:
            band = picture[row * cell : (row + 1) * cell]
            band[:, what * cell : (what + 1) * cell] = cue_colour
            left = num_cues * cell + where * cell // 2  # a side is one half of the side channel's cell
            band[:, left : left + cell // 2] = side_colour

        white, green, red = (255, 255, 255), (40, 180, 70), (210, 50, 50)
        paint(1, self._side, self._cue, white, white)
        if self._answer is not None:
            where, what = self._answer
            paint(2, where, what, green if where == self._side else red, green if what == self._cue else red)
        return picture


def register() -> None:
    """Registers the environments of this module with Gymnasium; an id that is there already is left alone."""
    for name, settings in {
        "CartPoleNoVel-v1": {"max_episode_steps": 500, "reward_threshold": 475.0},
        "PendulumNoVel-v1": {"max_episode_steps": 200},
        "MountainCarContinuousNoVel-v0": {"max_episode_steps": 999, "reward_threshold": 90.0},
        # RecallCue says itself when it needs a reset: it goes without the wrapper that checks the order of calls.
        "RecallCue-v0": {"reward_threshold": 0.95, "order_enforce": False},
        "RecallCue5-v0": {"reward_threshold": 0.95, "order_enforce": False, "kwargs": {"delay": 5}},
        "RecallCue100-v0": {"reward_threshold": 0.95, "order_enforce": False, "kwargs": {"delay": 100}},
    }.items():
        entry_point = f"{__name__}:{name.rpartition('-')[0].rstrip('0123456789')}"
        if f"dualhead/{name}" not in gym.registry:
            # The passive checker would be a wrapper on every step; the tests run the full check_env.
            gym.register(f"dualhead/{name}", entry_point, disable_env_checker=True, **settings)  # type: ignore[arg-type]


register()
