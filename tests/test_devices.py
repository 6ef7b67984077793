"""What runs on a GPU, without one: device by device the same numbers, no mixing, and no waiting while acting."""

import agents
import numpy as np
import pytest
import torch
from gymnasium import spaces
from pretended_device import DEVICE, DeviceTensor, pretended_device
from settings import spec_segments, take_step

from dualhead.config import NetworkConfig, NormConfig, TurnoverConfig
from dualhead.errors import DataError
from dualhead.networks.heads import FactoredCategorical
from dualhead.norms import NormEvents
from dualhead.running.config import RunConfig
from dualhead.running.episodes import EpisodeTracker
from dualhead.running.playing import Player
from dualhead.running.session import Session
from dualhead.snapshot import live_tensors
from dualhead.spaces import ObservationSpec
from dualhead.types import on_device
from dualhead.worlds.commons.config import CommonsConfig
from dualhead.worlds.commons.world import Commons
from dualhead.worlds.streams import StreamStep

B = 3
SPACE = spaces.Dict(
    vector=spaces.Box(-1.0, 1.0, (3,), np.float32),
    index=spaces.Discrete(4, start=2),
    indices=spaces.MultiDiscrete([2, 3]),
    image=spaces.Box(0, 255, (5, 5, 2), np.uint8),
    action_mask=spaces.Dict(move=spaces.MultiBinary(3)),
)
HEADS = spaces.Dict(move=spaces.Discrete(3), vote=spaces.Discrete(2))
SETTINGS = {
    "rollout_length": 6,
    "sequence_length": 3,
    "batch_size": 9,
    "burn_in": 2,
    "num_epochs": 2,
    "normalize_observations": True,
    "normalize_rewards": True,
}
NORMS = NormConfig(resources=("A", "B"), internalization_threshold=0.5)


@pytest.fixture
def device(monkeypatch):
    with pretended_device(monkeypatch) as waits:
        yield waits


class Experience:
    """Random observations, rewards and endings, the same for the same seed, as NumPy arrays."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def observations(self, num_streams=B):
        rng = self.rng
        mask = rng.random((num_streams, 3)) < 0.5
        mask[:, 1] = True
        return {
            "vector": rng.uniform(-1, 1, (num_streams, 3)).astype(np.float32),
            "index": rng.integers(2, 6, num_streams),
            "indices": rng.integers(0, [2, 3], (num_streams, 2)),
            "image": rng.integers(0, 256, (num_streams, 5, 5, 2), dtype=np.uint8),
            "action_mask": {"move": mask.astype(np.int8)},
        }

    def answer(self):
        rng = self.rng
        events = NormEvents(rng.random((B, 2)) < 0.4, rng.random((B, 2)) < 0.4)
        rewards, terminated, truncated = rng.normal(size=B), rng.random(B) < 0.15, rng.random(B) < 0.2
        return (rewards, terminated, truncated), {"final_observations": self.observations(), "events": events}


def make_agent(device="cpu", memory="lstm", **given):
    given = {"observation_space": SPACE, "action_space": HEADS, "num_layers": 2, "norms": NORMS} | SETTINGS | given
    return agents.make_agent(memory, device=device, dtype=torch.float32, **given)


def take_steps(agent, num_steps):
    """Steps without an update; the experience goes on with the observations after them."""
    experience = Experience()
    for _ in range(num_steps):
        agent.act(experience.observations())
        answer, known = experience.answer()
        agent.record(*answer, **known)
    return experience


def train(agent, *, num_steps, before=lambda: None, after=lambda call: None, leave=False):
    """Head indices [num_steps, B, K], and the metrics of each update.

    With `leave` a stream whose episode has ended sits out the next step.
    """
    experience = Experience()
    observations, actions, metrics = experience.observations(), [], []
    active = np.ones(B, dtype=bool)
    for _ in range(num_steps):
        before()
        agent.act(observations, active=active if leave else None)
        after("act")
        actions.append(agent.rollout_memory.actions[agent.rollout_memory.length].cpu().numpy().copy())
        observations = experience.observations()
        answer, known = experience.answer()
        before()
        agent.record(*answer, **known)
        after("record")
        active = ~(active & (answer[1] | answer[2]))
        if agent.rollout_is_ready:
            metrics.append(agent.learn(observations))
    return np.stack(actions), metrics


def assert_same_run(ours, theirs):
    np.testing.assert_array_equal(ours[0], theirs[0])
    assert len(ours[1]) == len(theirs[1])
    for one, other in zip(ours[1], theirs[1]):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("memory", "settings", "leave"),
    [
        ("lstm", {}, False),
        (
            "gru",
            {"ratio": "joint", "state_refresh": "never", "normalize_advantages": "minibatch", "value_clip": 0.2},
            False,
        ),
        ("none", {"bootstrap_last": False, "burn_in": 0, "normalize_observations": False}, False),
        ("lstm", {"normalize_advantages": "rollout"}, True),
    ],
)
def test_an_agent_trains_on_a_device_as_on_the_cpu(device, memory, settings, leave):
    expected = train(make_agent("cpu", memory, **settings), num_steps=13, leave=leave)
    agent = make_agent(DEVICE, memory, **settings)
    assert_same_run(train(agent, num_steps=13, leave=leave), expected)
    for name, tensor in live_tensors(agent).items():
        assert isinstance(tensor, DeviceTensor) != name.startswith("rng/"), name


def test_many_streams_and_gaussian_actions(device):
    # From 32 streams on, acting calls the sequence kernel.
    spaces_of = {"observation_space": spaces.Box(-1, 1, (4,)), "action_space": spaces.Box(-2, 2, (2,)), "norms": None}
    settings = {"num_streams": 40, "rollout_length": 4, "batch_size": 80, "normalize_observations": False}
    results = []
    for where in ("cpu", DEVICE):
        agent = make_agent(where, **spaces_of, **settings)
        rng = np.random.default_rng(0)
        actions = []
        for _ in range(4):
            actions.append(agent.act(rng.uniform(-1, 1, (40, 4))))
            agent.record(rng.normal(size=40), np.zeros(40, bool), np.zeros(40, bool))
        results.append((np.stack(actions), [agent.learn(rng.uniform(-1, 1, (40, 4)))]))
    np.testing.assert_allclose(results[1][0], results[0][0], atol=1e-5)
    assert_same_run((results[0][0], results[1][1]), results[0])


def test_acting_waits_for_the_actions_and_nothing_else(device):
    agent = make_agent(DEVICE)
    seen = []
    train(agent, num_steps=6, before=device.counts.clear, after=lambda call: seen.append((call, dict(device.counts))))
    assert seen == [("act", {"download": 1}), ("record", {})] * 6


def test_an_update_does_not_wait_for_its_minibatches(device):
    waited = []
    for num_epochs in (4, 8):
        agent = make_agent(DEVICE, num_epochs=num_epochs, batch_size=3)
        experience = take_steps(agent, 6)
        device.counts.clear()
        metrics = agent.learn(experience.observations())
        assert metrics["update/optimizer_steps"] >= 5 * num_epochs
        waited.append(device.counts.total())
    assert waited[0] == waited[1] <= 20


def test_tensors_of_the_device_stay_there(device):
    agent = make_agent(DEVICE)
    observations = Experience().observations()
    moves = on_device(torch.as_tensor(observations.pop("action_mask")["move"]), DEVICE)
    observations = {name: on_device(torch.as_tensor(part), DEVICE) for name, part in observations.items()}
    observations["action_mask"] = {"move": moves}
    device.counts.clear()
    actions = agent.act(observations)
    assert all(isinstance(part, DeviceTensor) for part in actions.values())
    assert not device.counts


@pytest.mark.parametrize(
    ("part", "number", "message"),
    [
        ("vector", np.nan, "'vector' of stream 1 is nan: expected finite"),
        ("index", 6, "'index' of stream 1 is 6: expected Discrete"),
        ("indices", 3, "'indices' of stream 1 is 3: expected MultiDiscrete"),
        ("action_mask/move", 0, "'action_mask' of stream 1 allows no choice"),
    ],
)
def test_wrong_observations_are_found_at_once_from_the_host_and_in_learn_from_the_device(device, part, number, message):
    bad = Experience().observations()
    leaf, _, head = part.partition("/")
    (bad[leaf][head] if head else bad[leaf])[1] = number
    with pytest.raises(DataError, match=message):
        make_agent(DEVICE).act(bad)
    agent = make_agent(DEVICE)
    take_steps(agent, 2)
    agent.rollout_memory.observations[part][agent.rollout_memory.max_tail + 1, 1] = number
    with pytest.raises(DataError, match="step 2 of this rollout of 2: .*" + message):
        agent.learn(Experience().observations(), partial=True)


def test_wrong_rewards_are_found_at_once_from_the_host_and_in_learn_from_the_device(device):
    agent = make_agent(DEVICE)
    agent.act(Experience().observations())
    answer, known = Experience().answer()
    with pytest.raises(DataError, match="reward of stream 1 is inf"):
        agent.record(np.array([0.0, np.inf, 0.0]), *answer[1:], **known)
    agent.record(*answer, **known)
    agent.rollout_memory.rewards[0, 2] = torch.inf
    with pytest.raises(DataError, match="reward of stream 2 is inf"):
        agent.learn(Experience().observations(), partial=True)


def test_checkpoints_move_between_devices(device, tmp_path, monkeypatch):
    there, here = make_agent(DEVICE), make_agent()
    train(there, num_steps=8)
    there.save(tmp_path / "there")
    here.load(tmp_path / "there")
    here.save(tmp_path / "here")
    there.load(tmp_path / "here")
    monkeypatch.setattr(FactoredCategorical, "sample", lambda self, generator: self.mode())
    goes_on = [agent.act(Experience(1).observations()) for agent in (there, here)]
    assert goes_on[0].keys() == goes_on[1].keys()
    for name, part in goes_on[0].items():
        np.testing.assert_array_equal(part, goes_on[1][name])


def test_a_checkpoint_from_a_gpu_is_loaded_without_its_generator():
    """A CUDA generator's state is 16 bytes, and says nothing to one of the CPU."""
    there, here = make_agent(), make_agent()
    train(there, num_steps=8)
    tensors, metadata = there.state()
    own = here.state()[0]["rng/sampling"]
    here.restore({**tensors, "rng/sampling": torch.zeros(16, dtype=torch.uint8)}, {**metadata, "device": "cuda"})
    assert torch.equal(here.state()[0]["rng/sampling"], own)
    assert torch.equal(here.state()[0]["rng/shuffling"], tensors["rng/shuffling"])
    assert here.num_steps == there.num_steps


def test_the_random_numbers_of_a_gpu_are_not_touched(monkeypatch):
    def seed_all(seed):
        raise AssertionError(f"every GPU was seeded with {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    make_agent()


def commons_run(policies, **settings):
    return RunConfig(
        env="commons",
        num_envs=2,
        total_steps=1000,
        policies=policies,
        enforce_norms=True,
        world=settings,
        network=NetworkConfig.spec(hidden_size=8, encoder_sizes=(8,)),
        ppo=spec_segments(rollout_length=6, sequence_length=3, batch_size=9, num_epochs=2),
        turnover=TurnoverConfig(first_turn=6, every_turns=6, num_agents=1),
    )


@pytest.mark.parametrize("policies", ["shared", "independent"])
@pytest.mark.parametrize("form", ["grid", "bandit"])
def test_a_run_in_the_commons_keeps_to_its_device(device, monkeypatch, form, policies):
    settings = {"form": form, "num_agents": 2, "epoch_turns": 4, "voting_season": 3, "agent_index": True}
    if form == "grid":
        settings |= {"max_resources": 9, "respawn_probability": 0.05}
    config = commons_run(policies, **settings)
    metrics, saved = [], []
    for where in ("cpu", str(DEVICE)):
        monkeypatch.setattr("dualhead.running.session.choose_device", lambda _, where=where: where)
        session = Session(config)
        session.begin()
        metrics.append([])
        for _ in range(2):
            device.counts.clear()
            while not session.learner.rollout_is_ready:
                take_step(session)
            if where != "cpu":
                assert not device.counts  # not even for the actions: the world takes them where they are
            metrics[-1].append(session.learn())
        saved.append(session.state())
    for one, other in zip(*metrics):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True)
    session.restore(*saved[0], source="a checkpoint of the CPU")
    assert session.learner.num_steps == 12 * config.num_streams
    take_step(session)


@pytest.mark.parametrize("coding", ["composite", "simple"])
def test_actions_of_the_commons_in_one_number(device, coding):
    worlds = Commons(CommonsConfig(coding=coding, num_agents=2), num_worlds=2, device=DEVICE)
    worlds.reset(seed=0)
    device.counts.clear()
    worlds.step(np.array([0, 1, 2, 3]))
    assert not device.counts
    with pytest.raises(ValueError, match="expected numbers from 0 to"):
        worlds.step(np.array([0, 1, 2, 99]))
    worlds.frame()


def test_returns_are_the_same_however_late_rewards_arrive(device):
    trackers = [EpisodeTracker(B), EpisodeTracker(B)]
    for _ in range(3):
        rewards, ended = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, False])
        for tracker, seen in zip(trackers, (rewards, on_device(rewards, DEVICE))):
            tracker.step(StreamStep(None, seen, ended, ended, None, None))
    device.counts.clear()
    assert trackers[1].metrics() == trackers[0].metrics() == {
        "episode/mean_return": 2.0, "episode/mean_length": 1.0, "episode/count": 3,
    }  # fmt: skip
    assert device.counts == {"download": 1}
    assert trackers[1].state() == trackers[0].state()
    assert trackers[1].state()["running_returns"] == [3.0, 0.0, 9.0]


def test_a_policy_on_a_device_is_played_with_arrays(device):
    agent = make_agent(DEVICE, norms=None)
    player = Player(agent.policy, SPACE, HEADS)
    experience = Experience()
    for starts in ([True] * B, [False, True, False]):
        chosen = player.act(experience.observations(), starts, deterministic=False)
        assert chosen["move"].shape == (B,)
    ObservationSpec(SPACE).to_tensors(experience.observations(), B, device=DEVICE, dtype=torch.float32)


def test_the_pretended_device_keeps_the_rules(device):
    x = torch.ones(2, 3, device=DEVICE)
    assert x.device == DEVICE
    for mixed in (
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, torch.ones(1, 3)]),
        lambda: x.index_select(0, torch.tensor([0])),
        lambda: torch.where(torch.ones(3, dtype=torch.bool), x, 0.0),
        lambda: torch.ones(2)[torch.tensor([0], device=DEVICE)],
        lambda: x.index_put_((torch.tensor([0]),), torch.ones(3)),
        lambda: x.masked_fill(torch.ones(3, dtype=torch.bool), 0.0),
        lambda: torch.nn.Linear(3, 2)(x),
        lambda: torch.rand(3, generator=torch.Generator(), device=DEVICE),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()
    with pytest.raises(TypeError):
        x.numpy()
    mask = torch.tensor([True, False], device=DEVICE)
    device.counts.clear()
    x[mask] = 0.0
    assert (2.0 * x).held.tolist() == [[0.0] * 3, [2.0] * 3]
    assert not device.counts
    assert x[mask].shape == (1, 3)
    assert bool(x.any())
    x.nonzero()
    x.cpu()
    x.copy_(torch.ones(2, 3))
    assert device.counts == {"nonzero": 2, "_local_scalar_dense": 1, "download": 1, "upload": 1}
