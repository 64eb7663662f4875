"""What the autograd engine is doing now: PyTorch has no public names for it.

One short function each, so that a new release of PyTorch has to be checked against this file only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def current_pass() -> int:
    """The number of the backward pass that this thread is in; -1 outside of any."""
    return int(torch._C._current_graph_task_id())


def in_backward_pass() -> bool:
    """Whether this thread is inside a backward pass; a forward pass there is activation checkpointing's second one."""
    return current_pass() != -1


def graph_is_kept() -> bool:
    """Whether the present backward pass leaves the graph for another one (``retain_graph``, ``create_graph``)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def current_node_number() -> int:
    """The number of the autograd node that runs backward now; every node that was made in a thread has its own."""
    return int(torch._C._current_autograd_node()._sequence_nr())


def reaches_any(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the present backward pass computes the gradient of one of ``parameters``.

    That of a loss does. ``torch.autograd.grad(output, inputs)``, by which a physics-informed network takes derivatives
    by its inputs, does not, but a graph made by it may be part of a loss.
    """
    nothing_to_train = True
    for parameter in parameters:
        if parameter.requires_grad:
            nothing_to_train = False
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            try:
                if torch._C._will_engine_execute_node(node):
                    return True
            except RuntimeError:  # the parameter is an input of torch.autograd.grad, which computes its gradient
                return True
    return nothing_to_train
