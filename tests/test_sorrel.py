"""The agent as Sorrel's model: a host that makes Sorrel's calls equals a loop written by hand, bit by bit."""

import importlib.resources
import importlib.util
import itertools
import pickle

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sorrel_host import NUM_ACTIONS, NUM_NUMBERS, Host, World

import dualhead.agent
from dualhead import CheckpointError, DataError, DualHeadRecurrentPPO, NetworkConfig, NormConfig, NormEvents, PPOConfig
from dualhead.sorrel import SorrelDualHeadPPO

needs_sorrel = pytest.mark.skipif(
    importlib.util.find_spec("sorrel") is None,
    reason="Sorrel is not installed: pip install dualhead[sorrel], Python 3.12",
)
ROLLOUT = 8
CONFIG = PPOConfig(rollout_length=ROLLOUT, batch_size=ROLLOUT, num_epochs=2, burn_in=2)
NETWORK = NetworkConfig(hidden_size=8, encoder_sizes=(8,), previous_action=True, previous_reward=True)
NORMS = NormConfig(resources=("gem", "bone"), internalization_threshold=0.5)
SCRIPT = (("experiment", 3), ("memories", 2), ("experiment", 2))


def make_model(input_size=NUM_NUMBERS, action_space=NUM_ACTIONS, **given):
    return SorrelDualHeadPPO(input_size, action_space, **{"seed": 3, "config": CONFIG, "network": NETWORK} | given)


def drive_by_hand(agent, world, *, max_turns, end_of_epoch):
    """The same epochs without Sorrel: this loop knows when an epoch's last turn has come."""
    learns = True
    for what, num_epochs in SCRIPT:
        learns = learns and what == "experiment"
        for _ in range(num_epochs):
            world.reset()
            if agent.rollout_memory.length:
                agent.abandon_rollout()
            for turn in range(1, max_turns + 1):
                observation = world.observe()
                if agent.rollout_is_ready and learns:
                    agent.learn(observation)
                elif agent.rollout_is_ready:
                    agent.num_steps -= ROLLOUT
                    agent.rollout_memory.clear()
                actions = agent.act(observation)
                reward, done, happened = world.step(int(actions[0]))
                events = None
                if agent.norms is not None:
                    collected = [[name in dict(happened) for name in NORMS.resources]]
                    punished = [[dict(happened).get(name, False) for name in NORMS.resources]]
                    events = NormEvents(np.array(punished), np.array(collected))
                ends = turn == max_turns
                terminated = done or (ends and end_of_epoch == "terminated")
                agent.record(
                    [reward], [terminated], [ends and not terminated], final_observations=observation, events=events
                )
            if what == "experiment":
                agent.learn(partial=True)
                learns = True  # the host has not said before that it trains again


@pytest.fixture
def updates(monkeypatch):
    """Every update's rollout and advantages, as the tensors' bytes."""
    seen, real = [], dualhead.agent.ppo_update

    def spy(policy, memory, *, advantages, **settings):
        rollout = memory.tensors(memory.length, memory.tail_length) | {"advantages": advantages}
        seen.append({name: tensor.numpy().tobytes() for name, tensor in rollout.items()})
        return real(policy, memory, advantages=advantages, **settings)

    monkeypatch.setattr(dualhead.agent, "ppo_update", spy)
    return seen


def bits(agent):
    return {name: tensor.numpy().tobytes() for name, tensor in agent.state()[0].items()}


@pytest.mark.parametrize("max_turns", [1, 5, ROLLOUT, ROLLOUT + 1, 2 * ROLLOUT, 21])
@pytest.mark.parametrize(
    ("done_at", "end_of_epoch", "norms"),
    [
        ((), "truncated", None),
        ((), "terminated", None),
        ((2, 5, 8, 13), "truncated", NORMS),
        ((3,), "terminated", NORMS),
    ],
    ids=["whole", "whole-zero", "ends-norms", "ends-zero-norms"],
)
def test_sorrel_s_calls_equal_a_loop_by_hand(updates, max_turns, done_at, end_of_epoch, norms):
    resources = NORMS.resources if norms else ()
    model = make_model(norms=norms, end_of_epoch=end_of_epoch)
    host = Host(World(7, done_at=done_at, resources=resources), model, max_turns=max_turns)
    for what, num_epochs in SCRIPT:
        if what == "experiment":
            host.run_experiment(num_epochs - 1)
        else:
            weights = bits(model.agent) | {"rng/sampling": b""}
            host.generate_memories(num_epochs)
            changed = {name for name, now in bits(model.agent).items() if now != weights[name]}
            assert not {name for name in changed if name.startswith(("policy", "optimizer"))}
    with_sorrel = list(updates)
    updates.clear()

    box = spaces.Box(-np.inf, np.inf, (NUM_NUMBERS,), np.float32)
    agent = DualHeadRecurrentPPO(box, spaces.Discrete(NUM_ACTIONS), config=CONFIG, network=NETWORK, norms=norms, seed=3)
    world = World(7, done_at=done_at, resources=resources)
    drive_by_hand(agent, world, max_turns=max_turns, end_of_epoch=end_of_epoch)

    per_epoch = -(-max_turns // ROLLOUT)  # updates of one epoch, the last of them by train_step
    assert len(with_sorrel) == 4 * per_epoch + 1  # the first epoch after the memories has only that one
    assert with_sorrel == updates
    assert bits(model.agent) == bits(agent)
    assert model.agent.num_steps == agent.num_steps
    assert [entry[0] for entry in host.log] == [0, 1, 2, 0, 1]
    assert np.isfinite([entry[1] for entry in host.log]).all()


def test_the_last_value_is_that_of_the_last_observation():
    """Independently of the loop by hand: δ of the last step is r + γ V(o) − V, with V(o) from the policy itself."""
    model = make_model(network=NetworkConfig(hidden_size=8), config=PPOConfig(rollout_length=ROLLOUT))
    model.start_epoch_action(epoch=0)
    state = np.full((1, NUM_NUMBERS), 0.5)
    model.memory.add(state, model.take_action(state), 2, False)
    following = model.agent._current_hidden
    with torch.no_grad():
        value = model.agent.policy.values({"observation": torch.full((1, NUM_NUMBERS), 0.5)}, following)
    model.end_epoch_action(epoch=0)
    rollout = model.agent.rollout_memory
    assert rollout.truncated[0]
    assert rollout.final_values[0] == value
    assert (model.agent._current_hidden.h == 0).all()


def test_memories_of_a_game_are_that_game():
    model = make_model()
    host = Host(World(1), model, max_turns=10)
    host.generate_memories(3)
    for states, actions, rewards, dones, positions in host.saved_games:
        assert states.shape == (10, NUM_NUMBERS)
        assert positions.tolist() == [[turn, action] for turn, action in enumerate(actions, start=1)]
        assert states[1:, -1].tolist() == actions[:-1].tolist()  # the world shows the action before
        assert rewards.shape == dones.shape == (10,)
    assert model.agent.num_updates == 0


def test_memory_overwrites_the_oldest():
    model = make_model(memory_size=3)
    Host(World(1), model, max_turns=10).generate_memories(1)
    assert len(model.memory) == 3
    assert model.memory.last_transition(3) is None
    assert [model.memory.last_transition(offset)[0] for offset in range(3)] == np.roll(
        model.memory.actions, -model.memory.idx
    )[::-1].tolist()


@pytest.mark.parametrize(
    ("heads", "num_actions", "number"),
    [
        ({"move": 5, "vote": 3}, 15, lambda move, vote: move * 3 + vote),
        ({"a": 2, "b": 3, "c": 4}, 24, lambda a, b, c: (a * 3 + b) * 4 + c),
        ("composite", 13, lambda move, vote: move * 3 + vote),
        ("simple", 7, lambda move, vote: move if vote == 0 else 3 + vote),
    ],
)
def test_an_action_counts_the_choices_of_the_heads(heads, num_actions, number):
    model, world, seen = make_model(action_space=num_actions, heads=heads), World(2), set()
    assert model.get_last_factored_actions() is None
    for _ in range(300):
        state = world.observe()
        action = model.take_action(state)
        choices = model.get_last_factored_actions()
        assert action == number(*choices)
        assert list(choices) == model.agent.rollout_memory.actions[model.agent.rollout_memory.length, 0].tolist()
        model.memory.add(state, action, 0.0, False)
        seen.add(action)
    assert max(seen) < num_actions
    assert len(seen) >= min(num_actions - 1, 12)  # 12 and 6 are to do nothing, which no pair of choices is


def test_one_head_serves_the_historical_codings():
    model = make_model(action_space=13)
    assert 0 <= model.take_action(np.zeros(NUM_NUMBERS)) < 13
    assert model.get_last_factored_actions() is None


def test_grid_and_scalars_are_both_seen():
    channels, height, width, num_scalars = 3, 5, 4, 2
    numbers = np.arange(3 * 5 * 4 + num_scalars, dtype=float)
    model = make_model((1, numbers.size), grid=(channels, height, width))
    model.take_action(numbers[None])
    seen = model.agent.rollout_memory.observations
    for place in itertools.product(range(channels), range(height), range(width)):
        c, y, x = place
        assert seen["grid"][(2, 0, *place)] == (c * height + y) * width + x  # after 2 rows for burn-in
    assert seen["scalars"][2, 0].tolist() == [60, 61]
    assert tuple(model.agent.policy.encoder.parts[0].shape) == (channels, height, width)

    def values(**changed):
        leaves = {"grid": torch.zeros(1, 3, 5, 4), "scalars": torch.zeros(1, 2)} | changed
        model.agent._previous = model.agent.policy.previous.nothing(1, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            return model.agent.policy.values(leaves | model.agent._previous, model.agent.policy.initial_state(1))

    assert values() != values(grid=torch.ones(1, 3, 5, 4))
    assert values() != values(scalars=torch.ones(1, 2))


def test_a_grid_of_colours_is_divided_by_its_greatest_number():
    model = make_model(27, grid=(3, 3, 3), grid_high=255.0)
    assert model.agent.policy.encoder.parts[0].scale == 1 / 255


def test_layer_size_is_the_width_of_encoder_and_memory():
    model = make_model(layer_size=24)
    assert (model.agent.network.hidden_size, model.agent.network.encoder_sizes) == (24, (24,))


def test_a_saved_model_goes_on_as_itself(tmp_path):
    path = tmp_path / "checkpoints" / "2026-11-25_10-00-00-agent-0.pkl"
    first = make_model()
    Host(World(4), first, max_turns=12).run_experiment(2)
    first.save(path)
    second = make_model(seed=99)
    second.load(path)
    for model in (first, second):
        Host(World(5), model, max_turns=12).run_experiment(1)
    assert bits(first.agent) == bits(second.agent)
    DualHeadRecurrentPPO.from_file(path)


def test_a_pickle_is_refused_and_not_read(tmp_path):
    path = tmp_path / "agent.pkl"
    path.write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(CheckpointError):
        make_model().load(path)


def test_nothing_touches_the_global_random_state():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    Host(World(4), make_model(), max_turns=9).run_experiment(1)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_models_without_a_seed_differ():
    first, second = make_model(seed=None), make_model(seed=None)
    assert bits(first.agent) != bits(second.agent)
    assert bits(make_model(seed=first.seed).agent) == bits(first.agent)


def test_epsilon_is_the_host_s_number():
    model = make_model(epsilon=0.5)
    model.epsilon_decay(0.1)
    assert model.epsilon == pytest.approx(0.45)
    model.set_epsilon(0.2)
    assert model.epsilon == 0.2


def test_a_shared_model_is_refused():
    model = make_model()
    for _ in range(2):
        model.reset()
    model.start_epoch_action(epoch=0)
    with pytest.raises(RuntimeError, match="share this model"):
        model.start_epoch_action(epoch=0)


def test_an_epoch_that_failed_is_dropped():
    """The world raises after `take_action`; the next epochs are as if that one had not been, but for random numbers."""
    model = make_model()
    host = Host(World(4), model, max_turns=6)
    model.start_epoch_action(epoch=0)
    host.take_turn(logs=False)
    model.take_action(host.world.observe())
    with pytest.raises(RuntimeError, match="end_epoch_action"):
        model.save("never.pkl")
    assert model.train_step() == 0.0
    host.run_experiment(0)
    assert model.agent.num_steps == 6


def test_calls_in_a_wrong_order_are_refused():
    model, state = make_model(), np.zeros((1, NUM_NUMBERS))
    with pytest.raises(RuntimeError, match="take_action"):
        model.memory.add(state, 0, 0.0, False)
    action = model.take_action(state)
    with pytest.raises(RuntimeError, match="memory"):
        model.take_action(state)
    with pytest.raises(ValueError, match="action: expected"):
        model.memory.add(state, action + 1, 0.0, False)
    model.add_memory_ppo(1.0, True)
    assert model.train_step() == 0.0  # the epoch has not ended
    model.end_epoch_action(epoch=0)
    assert model.agent.rollout_memory.terminated[0]
    with pytest.raises(ValueError, match="norms"):
        model.note("gem", True)
    with pytest.raises(ValueError, match="resource"):
        make_model(norms=NORMS).note("stone")
    with pytest.raises(RuntimeError, match="action"):
        make_model(norms=NORMS).note("gem")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heads": {"move": 4, "vote": 3}}, "heads"),
        ({"heads": "composite", "action_space": 12}, "action_space"),
        ({"heads": "simple", "action_space": 3}, "action_space"),
        ({"heads": "pair"}, "heads"),
        ({"grid": (2, 2, 2)}, "grid"),
        ({"end_of_epoch": "never"}, "end_of_epoch"),
        ({"layer_size": 0}, "hidden_size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_model(**given)


def test_states_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="state: expected 5 numbers"):
        make_model().take_action(np.zeros((1, NUM_NUMBERS + 1)))
    with pytest.raises(DataError):
        make_model().take_action(np.full((1, NUM_NUMBERS), np.nan))


TREASUREHUNT = {
    "experiment": {"epochs": 2, "max_turns": 12, "record_period": 2},
    "model": {
        "agent_vision_radius": 2,
        "epsilon_decay": 0.1,
        "observation_spec": "onehot",
        "num_agents": 1,
        "save_weights": True,
    },
    "world": {"height": 9, "width": 9, "gem_value": 10, "food_value": 5, "bone_value": -10, "spawn_prob": 0.05},
}


class Traced(SorrelDualHeadPPO):
    """Writes down which methods the host calls, with what."""

    def __init__(self, *sizes, **given):
        self.calls = []
        super().__init__(*sizes, **given)
        self.memory.add = self._traced("add", self.memory.add)
        self.memory.current_state = self._traced("current_state", self.memory.current_state)
        self.memory.last_transition = self._traced("last_transition", self.memory.last_transition)
        for name in ("take_action", "start_epoch_action", "end_epoch_action", "train_step", "reset", "eval"):
            setattr(self, name, self._traced(name, getattr(self, name)))
        self.epsilon_decay = self._traced("epsilon_decay", self.epsilon_decay)

    def _traced(self, name, method):
        def call(*arguments, **named):
            # Kinds of arguments: sizes differ between worlds, and rewards are int here and float there.
            kinds = [type(a).__name__.replace("int", "float") for a in arguments]
            shapes = [(a.ndim, a.dtype) for a in arguments if isinstance(a, np.ndarray)]
            self.calls.append((name, *kinds, *shapes, *sorted(named)))
            return method(*arguments, **named)

        return call


def treasurehunt(make, **model_settings):
    from sorrel.examples.treasurehunt.entities import EmptyEntity
    from sorrel.examples.treasurehunt.env import TreasurehuntEnv
    from sorrel.examples.treasurehunt.world import TreasurehuntWorld

    class Env(TreasurehuntEnv):
        def setup_agents(self):
            super().setup_agents()
            for agent in self.agents:
                agent.model = make(agent.observation_spec.input_size, agent.action_spec.n_actions)
                agent.model.memory.extra_data["positions"] = np.zeros((agent.model.memory.capacity, 2), dtype=np.int64)

    config = TREASUREHUNT | {"model": TREASUREHUNT["model"] | model_settings}
    return Env(TreasurehuntWorld(config=config, default_entity=EmptyEntity()), config)


@needs_sorrel
@pytest.mark.filterwarnings("ignore")
def test_the_host_of_these_tests_makes_sorrel_s_calls(tmp_path):
    from sorrel.utils.logging import Logger

    env = treasurehunt(lambda *sizes: Traced(*sizes, config=CONFIG))
    env.run_experiment(animate=False, logger=Logger(2), output_dir=tmp_path)
    env.generate_memories(2, output_dir=tmp_path)

    model = Traced(NUM_NUMBERS, NUM_ACTIONS, config=CONFIG)
    host = Host(World(0), model, max_turns=12)
    host.run_experiment(2)
    host.generate_memories(2)
    assert env.agents[0].model.calls == model.calls
    assert len(np.load(tmp_path / "memories" / "agent0.npz")["states"]) == 24


@needs_sorrel
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("max_turns", [5, 12])
def test_treasurehunt_trains(tmp_path, max_turns):
    from sorrel.utils.logging import Logger

    env, logger = treasurehunt(lambda *sizes: SorrelDualHeadPPO(*sizes, config=CONFIG), num_agents=2), Logger(2)
    env.config.experiment.max_turns = max_turns
    env.run_experiment(animate=False, logger=logger, output_dir=tmp_path)
    assert len(logger.rewards) == 3
    assert np.isfinite(logger.losses).all()
    assert logger.epsilons == pytest.approx([0.0] * 3)
    for number, agent in enumerate(env.agents):
        assert agent.model.agent.num_steps == 3 * max_turns
        newest = max((tmp_path / "checkpoints").glob(f"*-agent-{number}.pkl"))
        before = bits(agent.model.agent)
        agent.model.load(newest)
        assert bits(agent.model.agent) == before


@needs_sorrel
@pytest.mark.filterwarnings("ignore")
def test_cleanup_trains_with_an_input_size_of_two_axes(tmp_path):
    from omegaconf import OmegaConf
    from sorrel.examples import cleanup  # noqa: F401
    from sorrel.examples.cleanup.entities import EmptyEntity
    from sorrel.examples.cleanup.env import CleanupEnv
    from sorrel.examples.cleanup.world import CleanupWorld
    from sorrel.utils.logging import Logger

    class Env(CleanupEnv):
        def setup_agents(self):
            super().setup_agents()
            for agent in self.agents:
                sizes = agent.observation_spec.input_size, agent.action_spec.n_actions
                assert len(sizes[0]) == 2
                agent.model = SorrelDualHeadPPO(*sizes, grid=(9, 11, 11), config=CONFIG)

    path = importlib.resources.files("sorrel.examples.cleanup") / "configs" / "config.yaml"
    config = OmegaConf.merge(
        OmegaConf.load(str(path)), {"experiment": {"epochs": 1, "max_turns": 10}, "agent": {"agent": {"num": 2}}}
    )
    env, logger = Env(CleanupWorld(config=config, default_entity=EmptyEntity()), config), Logger(1)
    env.run_experiment(animate=False, logger=logger, output_dir=tmp_path)
    assert np.isfinite(logger.losses).all()
    assert env.agents[0].model.agent.num_updates == 4  # two of 8 and 2 steps in each of two epochs


@needs_sorrel
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_treasurehunt_is_learned(tmp_path):
    """Twice the reward of the first epochs after 200; benchmarks/sorrel_treasurehunt.py compares with Sorrel's IQN."""
    from sorrel.utils.logging import Logger

    np.random.seed(0)  # noqa: NPY002  (what the world draws from)
    env = treasurehunt(lambda *sizes: SorrelDualHeadPPO(*sizes, seed=0), save_weights=False)
    env.config.experiment.epochs, env.config.experiment.max_turns = 199, 100
    logger = Logger(200)
    env.run_experiment(animate=False, logger=logger, output_dir=tmp_path)
    assert np.mean(logger.rewards[-40:]) > 2 * max(np.mean(logger.rewards[:40]), 1)
