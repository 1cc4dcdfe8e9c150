"""Runs the action ``drop``: the attention adds nothing."""

from __future__ import annotations

from kvsharer_exp.model.actions.stand_in import StandInRunner


class DropRunner(StandInRunner):
    """Method: attention drop, https://arxiv.org/abs/2406.15786."""
