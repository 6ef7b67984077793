"""Recurrent PPO: agents that remember, decide on several things at once and internalise norms."""
