"""The agent of the specification, one stream, written as plainly as it can be: what `test_spec_parity` compares with.

Nothing here comes from `dualhead`, and every number is written out. Section numbers (§) are those of the specification
that asks for the LSTM beside the GRU. What it calls unchanged (PPO, GAE, entropy) is the existing class: one-step
slices of a rollout, each from its stored state; the surrogate clipped per head and summed; no value after the last
step.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

GAMMA = 0.99
GAE_LAMBDA = 0.95
CLIP = 0.2
ENTROPY_COEF = 0.01
VALUE_COEF = 0.5
MAX_GRAD_NORM = 0.5
NUM_EPOCHS = 4
DTYPE = torch.float64


class ReferenceAgent(nn.Module):
    """Args:
    cell: `lstm` or `gru`.
    observation_shape: channels, height, width.
    head_sizes: choices of each head.
    """

    def __init__(self, cell: str, observation_shape: tuple[int, int, int], head_sizes: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = observation_shape
        self.device = torch.device("cpu")
        self.cell = cell
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc = nn.Linear(64 * height * width, 256)
        # §1
        if cell == "lstm":
            self.lstm = nn.LSTM(256, 256, batch_first=True)
        else:
            self.gru = nn.GRU(256, 256, batch_first=True)
        self.heads = nn.ModuleList([nn.Linear(256, n) for n in head_sizes])
        self.critic = nn.Linear(256, 1)
        self.to(DTYPE)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=3e-4, eps=1e-5)
        self._current_hidden = None
        self._clear_rollout()

    def _clear_rollout(self):
        names = ("states", "actions", "log_probs", "values", "rewards", "dones", "h_states")
        self.rollout_memory = {name: [] for name in names}

    # §2
    def _get_hidden_state(self):
        if self._current_hidden is None:
            h = torch.zeros(1, 1, 256, device=self.device, dtype=DTYPE)
            c = torch.zeros(1, 1, 256, device=self.device, dtype=DTYPE)
            self._current_hidden = (h, c) if self.cell == "lstm" else h
        return self._current_hidden

    # §3
    def _update_hidden_state(self, new_hidden):
        self._current_hidden = new_hidden

    # §4: states [N, C, H, W] are N sequences of one step each
    def _forward_base(self, states, hidden):
        x = F.relu(self.conv1(states))
        x = F.relu(self.conv2(x))
        x = F.relu(self.fc(x.flatten(1)))
        x = x.unsqueeze(1)
        if self.cell == "lstm":
            x, new_hidden = self.lstm(x, hidden)
        else:
            x, new_hidden = self.gru(x, hidden)
        return x.squeeze(1), new_hidden

    def _distributions_and_values(self, features):
        return [Categorical(logits=head(features)) for head in self.heads], self.critic(features).squeeze(1)

    @torch.no_grad()
    def step(self, state, action, reward, done):
        """One step of the environment, with an action (one index per head) that somebody else chose."""
        state = torch.as_tensor(state, dtype=DTYPE)
        action = torch.as_tensor(action)
        hidden = self._get_hidden_state()
        features, new_hidden = self._forward_base(state.unsqueeze(0), hidden)
        distributions, values = self._distributions_and_values(features)
        log_probs = [distribution.log_prob(a).item() for distribution, a in zip(distributions, action)]

        memory = self.rollout_memory
        memory["states"].append(state)
        memory["actions"].append(action)
        memory["log_probs"].append(log_probs)
        memory["values"].append(values.item())
        memory["rewards"].append(float(reward))
        memory["dones"].append(bool(done))
        # §5
        if self.cell == "lstm":
            h, c = hidden
            memory["h_states"].append((h.detach().cpu(), c.detach().cpu()))
        else:
            memory["h_states"].append(hidden.detach().cpu())

        self._update_hidden_state(new_hidden)
        # §8
        if done:
            self._current_hidden = None

    # §6
    def _prepare_hidden(self):
        if self.cell == "lstm":
            hs, cs = zip(*self.rollout_memory["h_states"])
            h_states = torch.cat(hs, dim=1).to(self.device)
            c_states = torch.cat(cs, dim=1).to(self.device)
            return h_states, c_states
        return torch.cat(self.rollout_memory["h_states"], dim=1).to(self.device)

    def advantages(self):
        """GAE, not normalised: one number per step."""
        rewards, values, dones = (self.rollout_memory[name] for name in ("rewards", "values", "dones"))
        advantages = [0.0] * len(rewards)
        gae = 0.0
        next_value = 0.0  # after the last step of the rollout
        for t in reversed(range(len(rewards))):
            if dones[t]:
                next_value = 0.0
                gae = 0.0
            delta = rewards[t] + GAMMA * next_value - values[t]
            gae = delta + GAMMA * GAE_LAMBDA * gae
            advantages[t] = gae
            next_value = values[t]
        return advantages

    def learn(self, minibatches):
        """Args:
        minibatches: for each epoch a list of index tensors into the rollout's steps.
        """
        assert len(minibatches) == NUM_EPOCHS
        memory = self.rollout_memory
        states = torch.stack(memory["states"])
        actions = torch.stack(memory["actions"])
        old_log_probs = torch.tensor(memory["log_probs"], dtype=DTYPE)
        values = torch.tensor(memory["values"], dtype=DTYPE)
        advantages = torch.tensor(self.advantages(), dtype=DTYPE)
        returns = advantages + values
        mean = advantages.sum() / len(advantages)
        std = (((advantages - mean) ** 2).sum() / (len(advantages) - 1)).sqrt()
        advantages = (advantages - mean) / (std + 1e-8)
        if self.cell == "lstm":
            h_states, c_states = self._prepare_hidden()
        else:
            h_states = self._prepare_hidden()

        for epoch in minibatches:
            for idx in epoch:
                # §7
                mb_states = states[idx]
                mb_h = h_states[:, idx, :]
                if self.cell == "lstm":
                    mb_c = c_states[:, idx, :]
                    features, _ = self._forward_base(mb_states, (mb_h, mb_c))
                else:
                    features, _ = self._forward_base(mb_states, mb_h)
                distributions, new_values = self._distributions_and_values(features)

                policy_loss = 0.0
                entropy = 0.0
                for k, distribution in enumerate(distributions):
                    ratio = torch.exp(distribution.log_prob(actions[idx, k]) - old_log_probs[idx, k])
                    plain = ratio * advantages[idx]
                    clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP) * advantages[idx]
                    policy_loss = policy_loss - torch.min(plain, clipped).mean()
                    entropy = entropy + distribution.entropy().mean()
                value_loss = F.mse_loss(new_values, returns[idx])
                loss = policy_loss + VALUE_COEF * value_loss - ENTROPY_COEF * entropy

                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters(), MAX_GRAD_NORM)
                self.optimizer.step()
        self._clear_rollout()
