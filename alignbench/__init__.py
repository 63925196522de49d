"""alignbench: a comparative benchmark of reinforcement learning methods for diffusion and flow models.

A *run* asks a *method* what to collect, lets the shared *rollout and reward stack* collect it, lets the method turn it
into losses, steps the *policy*, and writes down what that cost and what it gave. The *report* reads only what was
written.
"""

__version__ = "0.1.0"
